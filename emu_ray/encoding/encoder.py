"""A class for Ray Data that turns encoded pictures into raw latents of one bucket."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from emu_ray.errors import InputError
from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.pictures.decode import decode as decoded


class LatentEncoder:
    """Reads `image` (bytes) and `caption`; adds `bucket`, `latent_mean` and `latent_std` (float16, flat, channels first).

    A picture is scaled so that it covers the bucket and cropped in its middle. Pictures come from `selection` or `chosen`, where
    each has been decoded before; one that can't be decoded now raises InputError, since a changed pool is not to be trained on.
    """

    def __init__(self, autoencoder: str, size_px: int, *, device: str = "cpu", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.network = FourierAutoencoder.from_pretrained(autoencoder, torch_dtype=torch.float32).eval().to(device)
        self.size_px = size_px

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One batch of columns in, the `latents` columns out."""
        pixels = np.stack([fit(decode(b), self.size_px) for b in batch["image"]])
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(self.network.device).float() / 127.5 - 1
        mean, std = self.network.moments(images)
        count = len(pixels)
        return {
            "key": batch["key"],
            "bucket": np.array([f"{self.size_px}x{self.size_px}"] * count, dtype=object),
            "latent_mean": list(mean.reshape(count, -1).half().cpu().numpy()),
            "latent_std": list(std.reshape(count, -1).half().cpu().numpy()),
            "caption": batch["caption"],
        }


def decode(encoded: bytes) -> Image.Image:
    """The picture upright and in RGB, decoded as scoring decodes it; InputError where scoring would have rejected it."""
    found = decoded(encoded)
    if found.pixels is None:
        raise InputError(
            f"a picture of {len(encoded)} bytes can't be decoded ({found.error}) though it was selected: "
            "score and select again with `keep_reasons` that leave such pictures out"
        )
    return Image.fromarray(found.pixels)


def fit(image: Image.Image, size_px: int) -> np.ndarray:
    """(size_px, size_px, 3) uint8: scaled to cover the square (bicubic), cropped in the middle."""
    return np.asarray(ImageOps.fit(image, (size_px, size_px), Image.Resampling.BICUBIC))
