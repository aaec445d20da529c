"""A corpus of bad and odd pictures, made by code: name -> bytes and what the decoder must say ("" = decoded)."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

LOSSLESS = ("PNG", "GIF", "TIFF")
BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"  # cut within its first entry
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def picture(width_px: int = 64, height_px: int = 48, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Coloured patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width_px, height_px), Image.Resampling.NEAREST).convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def png(width: int, height: int, body: bytes, *, bits: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG with this header and compressed body, right or not."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def patched(whole: bytes, at: int, new: bytes) -> bytes:
    return whole[:at] + new + whole[at + len(new) :]


def _truncated() -> dict[str, tuple[bytes, str]]:
    found: dict[str, tuple[bytes, str]] = {}
    for format in FORMATS:
        whole = encoded(picture(96, 96), format)
        found[f"{format} cut after its header"] = (whole[: len(whole) // 5], "Error")
        found[f"{format} cut near its end"] = (whole[: len(whole) * 9 // 10], "Error")
    return found


def _mangled() -> dict[str, tuple[bytes, str]]:
    jpeg, whole_png = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    tables = jpeg.index(b"\xff\xc4")
    idat = whole_png.index(b"IDAT")
    return {
        "empty": (b"", "empty file"),
        "one zero byte": (b"\0", "UnidentifiedImageError"),
        "only zeros": (b"\0" * 5000, "UnidentifiedImageError"),
        "HTML named jpg": (b"<!doctype html><title>404</title>", "UnidentifiedImageError"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "UnidentifiedImageError"),
        "PDF": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF", "UnidentifiedImageError"),
        "PostScript, which Pillow would give to another program": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "UnidentifiedImageError",
        ),
        "BMP, not among the formats": (encoded(picture(), "BMP"), "UnidentifiedImageError"),
        "ICO, not among the formats": (encoded(picture(32, 32), "ICO"), "UnidentifiedImageError"),
        "a zip": (b"PK\x03\x04" + b"\0" * 60, "UnidentifiedImageError"),
        "JPEG magic alone": (b"\xff\xd8\xff", "Error"),
        "JPEG with Huffman tables of noise": (patched(jpeg, tables + 5, b"\xff" * 40), "Error"),
        "JPEG of 0 x 0": (_resized_jpeg(jpeg, 0, 0), "Error"),
        "JPEG that claims 65500 x 65500": (_resized_jpeg(jpeg, 65500, 65500), "pixels allowed|too large|Decompression"),
        "PNG magic alone": (b"\x89PNG\r\n\x1a\n", "Error"),
        "PNG with a wrong checksum in the header": (patched(whole_png, 29, b"\0\0\0\0"), "Error"),
        "PNG with noise for data": (patched(whole_png, idat + 4, b"\xaa" * 30), "Error"),
        "PNG without data": (png(8, 8, b""), "Error"),
        "PNG of 0 x 0": (png(0, 0, zlib.compress(b"")), "Error"),
        "PNG with less data than its size": (png(64, 64, zlib.compress(b"\0" * 500)), "Error"),
        "PNG of an impossible bit depth": (png(8, 8, zlib.compress(b"\0" * 999), bits=13), "Error"),
        "GIF magic alone": (b"GIF89a", "Error"),
        "GIF of 0 x 0": (b"GIF89a" + b"\0" * 20, "Error"),
        "WebP container without a picture": (b"RIFF\x04\0\0\0WEBP", "Error"),
        "TIFF whose directory lies beyond the file": (b"II*\0\xff\xff\xff\x7f", "Error"),
        "TIFF whose directory points at itself": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "Error"),
    }


def _resized_jpeg(jpeg: bytes, width: int, height: int) -> bytes:
    frame = jpeg.index(b"\xff\xc0")
    return patched(jpeg, frame + 5, struct.pack(">HH", height, width))


def _bombs() -> dict[str, tuple[bytes, str]]:
    rows = zlib.compressobj(9)
    zeros = b"".join(rows.compress(b"\0" * (1 << 20)) for _ in range(286)) + rows.flush()
    text = zlib.compress(b"a" * (100 << 20), 9)
    itxt = chunk(b"zTXt", b"Comment\0\0" + text)
    good = zlib.compress(b"".join(b"\0" + b"\x80" * 24 for _ in range(8)))
    gif = encoded(picture(), "GIF")
    return {
        "PNG of 100 megapixels in 300 KB": (png(10_000, 10_000, zeros), "10000x10000 px, at most"),
        "PNG that claims 4 gigapixels": (png(65_535, 65_535, zlib.compress(b"")), "pixels allowed|exceeds"),
        "PNG with 100 MB of compressed text": (png(8, 8, good, extra=itxt), "Error"),
        "GIF that claims 65535 x 65535": (patched(gif, 6, b"\xff\xff\xff\xff"), "pixels allowed|exceeds"),
        "over the cap on bytes": (encoded(picture(), "JPEG") + b"\0" * (64 << 20), "bytes, at most"),
    }


def _odd_but_good() -> dict[str, tuple[bytes, str]]:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    frames = [picture(seed=n) for n in range(3)]
    sixteen = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))
    found = {f"a whole {format}": (encoded(picture(), format), "") for format in FORMATS}
    found |= {
        f"{format} with a broken EXIF": (encoded(picture(), format, exif=BROKEN_EXIF), "")
        for format in ("JPEG", "PNG", "WEBP")
    }
    return found | {
        "JPEG named png, as bytes have no name": (encoded(picture(), "JPEG"), ""),
        "JPEG with 60 KB of EXIF": (encoded(picture(), "JPEG", exif=exif), ""),
        "JPEG with bytes behind its end": (encoded(picture(), "JPEG") + b"trailing" * 100, ""),
        # libjpeg only warns, and Pillow doesn't pass it on: the rest is grey, which scoring may see
        "JPEG that claims to be higher than its data": (_resized_jpeg(encoded(picture(), "JPEG"), 64, 400), ""),
        "progressive JPEG": (encoded(picture(), "JPEG", progressive=True), ""),
        "JPEG in CMYK": (encoded(picture(mode="CMYK"), "JPEG"), ""),
        "JPEG in grey": (encoded(picture(mode="L"), "JPEG"), ""),
        "PNG of 16 bits": (encoded(sixteen, "PNG"), ""),
        "TIFF of 16 bits": (encoded(sixteen, "TIFF"), ""),
        "PNG of 1 bit": (encoded(picture(mode="1"), "PNG"), ""),
        "PNG with a palette and transparency": (encoded(picture(mode="RGBA").quantize(16), "PNG"), ""),
        "PNG with alpha": (encoded(picture(mode="RGBA"), "PNG"), ""),
        "PNG of 1 x 1": (encoded(picture(1, 1), "PNG"), ""),
        "JPEG of 1 x 3000": (encoded(picture(1, 3000), "JPEG"), ""),
        "animated GIF": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), ""),
        "animated WebP": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), ""),
        "animated PNG": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), ""),
        "TIFF of several pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), ""),
        "TIFF in CMYK": (encoded(picture(mode="CMYK"), "TIFF"), ""),
        "TIFF of 32 bits": (encoded(Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)), "TIFF"), "no known range"),
        "TIFF of floats, of no known range": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "no known range"),
    }  # fmt: skip


def corpus() -> dict[str, tuple[bytes, str]]:
    """All kinds; a pattern that the error must match, "" for what must be decoded."""
    makers: tuple[Callable[[], dict[str, tuple[bytes, str]]], ...] = (_truncated, _mangled, _bombs, _odd_but_good)
    return {name: kind for maker in makers for name, kind in maker().items()}
