"""Bytes to pixels: what is accepted, and that nothing raises."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from emu_ray.pictures.decode import DecodeCaps, decode


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_whole_picture_becomes_rgb(noise_picture: Callable[..., bytes], format: str) -> None:
    found = decode(noise_picture(1, 20, 10, format))
    assert found.error == "" and found.pixels is not None
    assert found.pixels.shape == (10, 20, 3) and found.pixels.dtype == np.uint8


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_an_error_and_not_half_a_picture(
    noise_picture: Callable[..., bytes], format: str
) -> None:
    whole = noise_picture(1, 96, 96, format)
    found = decode(whole[: len(whole) * 2 // 3])
    assert found.pixels is None and found.error


@pytest.mark.parametrize(
    "raw", [b"", b"<html>404</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\0" * 20]
)
def test_what_is_no_picture_is_an_error(raw: bytes) -> None:
    found = decode(raw)
    assert found.pixels is None and found.error


def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert "12000x12000 px, at most" in decode(bomb).error


def test_bytes_over_the_cap_are_refused(noise_picture: Callable[..., bytes]) -> None:
    assert "at most 10 allowed" in decode(noise_picture(), DecodeCaps(max_image_bytes=10)).error


def test_transparency_becomes_white_and_exif_rotation_is_applied() -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(stream, "PNG")
    clear = decode(stream.getvalue()).pixels
    assert clear is not None and (clear == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    stream = io.BytesIO()
    Image.new("RGB", (16, 8)).save(stream, "JPEG", exif=exif)
    turned = decode(stream.getvalue()).pixels
    assert turned is not None and turned.shape == (16, 8, 3)
