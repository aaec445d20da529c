"""Pictures for benchmarks: as heavy to decode as photographs, made from a seed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, width_px: int = 1024, height_px: int = 768) -> bytes:
    """JPEG of quality 90: noise at all scales, about 0.3 bytes a pixel."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height_px, width_px, 3), np.float32)
    for level in range(7):
        cells = rng.normal(0, 40 / (level + 1), (3 * 2**level, 4 * 2**level, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(cells[..., channel]).resize((width_px, height_px), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(layer)
    total += rng.normal(0, 4, total.shape).astype(np.float32)
    stream = io.BytesIO()
    Image.fromarray(np.clip(total + 118, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_folder(folder: Path, count: int, width_px: int = 1024, height_px: int = 768) -> Path:
    """`count` different photographs, 000000.jpg and on: 16 are drawn, the others are these, shifted around."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [np.array(Image.open(io.BytesIO(photograph(i, width_px, height_px)))) for i in range(min(16, count))]
    for number in range(count):
        picture = np.roll(
            drawn[number % len(drawn)], (61 * (number // len(drawn)), 97 * (number // len(drawn))), axis=(0, 1)
        )
        Image.fromarray(picture).save(folder / f"{number:06d}.jpg", "JPEG", quality=90)
    return folder
