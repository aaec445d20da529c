"""Encoded bytes to pixels, or a sentence that says why not: no image, however broken, ends a run.

Caps are checked on the header, before a pixel is decoded, so that a small file can't claim gigabytes.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, kw_only=True)
class DecodeCaps:
    """What one image may cost."""

    max_image_bytes: int = 64 << 20
    max_image_pixels: int = 128_000_000


@dataclass(frozen=True)
class Decoded:
    """Either pixels, (H, W, 3) uint8 with EXIF rotation applied, or an error text; never both."""

    pixels: np.ndarray | None
    error: str  # "" = decoded


def decode(encoded: bytes, caps: DecodeCaps | None = None) -> Decoded:
    """RGB pixels of a JPEG, PNG or WebP; transparency becomes white. A truncated file is an error."""
    caps = caps or DecodeCaps()
    if not encoded:
        return Decoded(None, "empty file")
    if len(encoded) > caps.max_image_bytes:
        return Decoded(None, f"{len(encoded)} bytes, at most {caps.max_image_bytes} allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if image.width * image.height > caps.max_image_pixels:
                    too_many = f"{image.width}x{image.height} px, at most {caps.max_image_pixels} pixels allowed"
                    return Decoded(None, too_many)
                return Decoded(_rgb(image), "")
    except (
        Exception
    ) as error:  # a hostile file makes Pillow's plugins raise nearly anything; the row carries the reason
        return Decoded(None, f"{type(error).__name__}: {error}"[:200])


def _rgb(image: Image.Image) -> np.ndarray:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
