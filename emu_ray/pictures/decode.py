"""Encoded bytes to pixels, or a sentence that says why not: no image, however broken, ends a run.

Caps are checked on the header, before a pixel is decoded, so that a small file can't claim gigabytes. Colour profiles
are not applied: CMYK is converted by Pillow's plain formula.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps, features

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")  # of an object in memory: another in each run
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def _formats() -> tuple[str, ...]:
    """What this Pillow reads from memory without starting another program; HEIF needs the package pillow_heif."""
    formats = ["JPEG", "PNG", "WEBP", "GIF", "TIFF"]
    if features.check("avif"):
        formats.append("AVIF")
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        formats.append("HEIF")
    return tuple(formats)


FORMATS = _formats()


@dataclass(frozen=True, kw_only=True)
class DecodeCaps:
    """What one image may cost."""

    max_image_bytes: int = 64 << 20
    max_image_pixels: int = 64_000_000  # Pillow takes 4 bytes a pixel, up to three times where there is transparency


@dataclass(frozen=True)
class Decoded:
    """Either pixels, (H, W, 3) uint8 with EXIF rotation applied, or an error text; never both."""

    pixels: np.ndarray | None
    error: str  # "" = decoded


def decode(encoded: bytes, caps: DecodeCaps | None = None, side_px: int | None = None) -> Decoded:
    """RGB pixels of the first frame of an image in one of FORMATS; transparency becomes white. A truncated file is an error.

    With `side_px` a picture whose longer side is at least twice that is shrunk by a whole factor while it is decoded
    (JPEG: in the frequency domain), so that the longer side stays at or above `side_px`: much cheaper than decoding all.
    """
    caps = caps or DecodeCaps()
    if not encoded:
        return Decoded(None, "empty file")
    if len(encoded) > caps.max_image_bytes:
        return Decoded(None, f"{len(encoded)} bytes, at most {caps.max_image_bytes} allowed")
    try:
        with open_header(encoded) as image:
            if image.width * image.height > caps.max_image_pixels:
                too_many = f"{image.width}x{image.height} px, at most {caps.max_image_pixels} pixels allowed"
                return Decoded(None, too_many)
            return Decoded(_rgb(image, side_px), "")
    except (
        Exception
    ) as error:  # a hostile file makes Pillow's plugins raise nearly anything; the row carries the reason
        return Decoded(None, f"{type(error).__name__}: {_ADDRESS.sub('', str(error))}"[:200])


@contextlib.contextmanager
def open_header(encoded: bytes) -> Iterator[Image.Image]:
    """The image with its header read and no pixel decoded; raises what Pillow raises when it is none of FORMATS."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # libraries set it for the whole process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            yield image


def _rgb(image: Image.Image, side_px: int | None) -> np.ndarray:
    longer = max(image.size)
    if side_px is not None and longer >= 2 * side_px:
        least = max(1, image.width * side_px // longer), max(1, image.height * side_px // longer)
        image.draft(image.mode, least)
    image.load()
    with contextlib.suppress(
        Exception
    ):  # a broken EXIF makes Pillow raise nearly anything; the picture stays as it lies
        ImageOps.exif_transpose(image, in_place=True)
    factor = max(image.size) // side_px if side_px is not None else 1
    image = _shrunk(_eight_bits(image), factor)
    if image.has_transparency_data:
        image = _in_mode(image, "RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return np.array(_in_mode(image, "RGB"))


def _shrunk(image: Image.Image, factor: int) -> Image.Image:
    """Each side divided by `factor`, before an alpha channel or another mode costs a copy of the whole."""
    if factor <= 1:
        return image
    if image.has_transparency_data:  # weighted by alpha, else unseen colours would show
        return _in_mode(image, "RGBA").convert("RGBa").reduce(factor).convert("RGBA")
    return _in_mode(image, "RGB").reduce(factor)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converted, and itself where that would only copy it."""
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits scaled to 8: Pillow's own conversion would clip them to white."""
    if image.mode not in (*SIXTEEN_BIT, "I", "F"):
        return image
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # Pillow reads PNG's 16 bits as I
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    values = np.asarray(image)
    return Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
