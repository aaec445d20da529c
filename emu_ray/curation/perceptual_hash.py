"""A 64-bit hash that hardly changes when a picture is resized, recompressed or brightened a little."""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

BITS = 64


def perceptual_hash(pixels: np.ndarray) -> str:
    """16 hex digits: the DCT hash ("phash") of the `imagehash` package; `pixels` is (H, W, 3) uint8."""
    return str(imagehash.phash(Image.fromarray(pixels), hash_size=8))


def as_integers(hashes: list[str]) -> np.ndarray:
    """(N,) uint64 of hashes as 16 hex digits."""
    return np.array([int(h, 16) for h in hashes], np.uint64)
