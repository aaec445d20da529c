"""A class for Ray Data that turns encoded pictures into raw latents, each of the bucket that fits its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from emu_ray.encoding.buckets import Size, name_of, nearest
from emu_ray.errors import InputError
from emu_ray.models.autoencoder import Autoencoder, load_autoencoder
from emu_ray.pictures.decode import decode as decoded
from emu_ray.records import ORIGIN


class LatentEncoder:
    """Reads `image` (bytes) and `caption`; adds `bucket`, `latent_mean` and `latent_std` (float16, flat, channels first), and `records.ORIGIN`.

    A picture is scaled so that it covers its bucket and cropped in the middle. Pictures come from `selection` or `chosen`, where
    each has been decoded before; one that can't be decoded now raises InputError, since a changed pool is not to be trained on.
    """

    def __init__(
        self,
        autoencoder: str | Autoencoder,
        sizes: list[Size],
        *,
        keeps_std: bool = True,
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        """`autoencoder` by its folder, or loaded; `sizes` are the buckets; without `keeps_std` the column `latent_std` is null."""
        torch.set_num_threads(threads)
        self.network = load_autoencoder(autoencoder).to(device) if isinstance(autoencoder, str) else autoencoder
        self.sizes, self.keeps_std = sizes, keeps_std

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One batch of columns in, the `latents` columns out, in the same order."""
        pictures = [decode(encoded, key) for encoded, key in zip(batch["image"], batch["key"], strict=True)]
        sizes = [nearest(*picture.size, self.sizes) for picture in pictures]
        fitted = [fit(picture, size) for picture, size in zip(pictures, sizes, strict=True)]
        means: list[Any] = [None] * len(fitted)
        stds: list[Any] = [None] * len(fitted)
        for size in sorted(set(sizes)):
            rows = [i for i, own in enumerate(sizes) if own == size]
            for row, mean, std in zip(rows, *self._encode(np.stack([fitted[i].pixels for i in rows])), strict=True):
                means[row], stds[row] = mean, std if self.keeps_std else None
        origin = np.array([found.origin for found in fitted], dtype=np.int32)
        return {
            "key": batch["key"],
            "bucket": np.array([name_of(size) for size in sizes], dtype=object),
            "latent_mean": means,
            "latent_std": stds,
            "caption": batch["caption"],
            **{name: origin[:, i] for i, name in enumerate(ORIGIN)},
        }

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat means and deviations, float16, of (B, H, W, 3) uint8."""
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(self.network.device).float() / 127.5 - 1
        mean, std = (part.reshape(len(pixels), -1).half().cpu().numpy() for part in self.network.moments(images))
        return mean, std


def decode(encoded: bytes, key: int) -> Image.Image:
    """The picture of pair `key` upright and in RGB, decoded as scoring decodes it; InputError where scoring would have rejected it."""
    found = decoded(encoded)
    if found.pixels is None:
        raise InputError(
            f"the picture of key {key}, {len(encoded)} bytes, can't be decoded ({found.error}) though it was selected: "
            "score and select again with `keep_reasons` that leave such pictures out"
        )
    return Image.fromarray(found.pixels)


@dataclass(frozen=True)
class Fitted:
    """A picture in its bucket, (H, W, 3) uint8, and where it came from: the numbers of `records.ORIGIN`."""

    pixels: np.ndarray
    origin: tuple[int, int, int, int]


def fit(image: Image.Image, size: Size) -> Fitted:
    """`image` scaled to cover `size` (bicubic) and cropped in the middle."""
    scale = max(target / side for target, side in zip(size, image.size, strict=True))
    left, top = (round((side * scale - target) / 2) for side, target in zip(image.size, size, strict=True))
    return Fitted(np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC)), (*image.size, left, top))
