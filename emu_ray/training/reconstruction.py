"""What the autoencoder learns: pictures and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.training.loop import Batch, Task


@dataclass(frozen=True)
class ImageExamples:
    """Images (N, H, W, 3) uint8, mirrored at random; `latent_shape` (C, h, w) sizes the posterior's noise."""

    images: np.ndarray
    latent_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`images` (B, 3, H, W) in -1..1 and `noise` (B, C, h, w)."""
        pixels = [
            self.images[r, :, ::-1] if g.random() < 0.5 else self.images[r] for r, g in zip(rows, rngs, strict=True)
        ]
        noise = np.stack([g.standard_normal(self.latent_shape, dtype=np.float32) for g in rngs])
        return {"images": to_signed(np.stack(pixels)), "noise": torch.from_numpy(noise)}


class AutoencoderTask(Task):
    """Reconstruction (L1 of pixels and of their differences) plus KL; the adversarial loss of the paper is not part of this task."""

    def __init__(self, network: FourierAutoencoder, *, kl_weight: float, edge_weight: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.kl_weight, self.edge_weight = kl_weight, edge_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `reconstruction`, `kl` (nats per latent number) and `psnr` in dB."""
        assert isinstance(self.network, FourierAutoencoder)
        images = batch["images"]
        mean, std = self.network.moments(images)
        out = self.network.decode_raw(mean + std * batch["noise"])
        pixel = (out - images).abs().mean()
        edges = sum(((out - images).diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        mse = (out - images).square().mean()
        loss = pixel + self.edge_weight * edges + self.kl_weight * kl
        return {"loss": loss, "reconstruction": pixel, "kl": kl, "psnr": 10 * torch.log10(4 / mse)}


@torch.no_grad()
def measure_latents(network: FourierAutoencoder, images: np.ndarray, batch_size: int = 64) -> None:
    """Sets the autoencoder's per-channel mean and deviation from (N, H, W, 3) uint8 images."""
    parts = [network.moments(to_signed(images[i : i + batch_size]))[0] for i in range(0, len(images), batch_size)]
    raw = torch.cat(parts)
    network.latent_mean.copy_(raw.mean((0, 2, 3)))
    network.latent_std.copy_(raw.std((0, 2, 3)))


def to_signed(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1
