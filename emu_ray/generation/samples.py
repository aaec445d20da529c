"""Generated pictures as files: PNG bytes, and many on one sheet."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def to_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def from_png(encoded: bytes | list[bytes]) -> np.ndarray:
    """PNG bytes to (H, W, 3) uint8, or a list of them to (N, H, W, 3)."""
    if isinstance(encoded, bytes):
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    return np.stack([from_png(e) for e in encoded])


def contact_sheet(images: np.ndarray, columns: int) -> Image.Image:
    """(N, H, W, 3) uint8 as one picture, row by row."""
    count, height, width = images.shape[:3]
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), ((i % columns) * width, (i // columns) * height))
    return sheet
