"""The losses: what each network of the project learns, and the examples it learns from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emu_ray.diffusion.schedule import NoiseSchedule, offset_noise
from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.models.small_t5 import corrupt_spans
from emu_ray.training.loop import Batch, Task

# Autoencoder ----------------------------------------------------------------------------------------------------------


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


# Denoiser -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentExamples:
    """Normalized latents (N, C, h, w) with text features by caption.

    `text_of` (N,) indexes `texts` (M, T, D); row 0 of `texts` is the empty caption. `caption_dropout` is the share of samples that get it,
    so that classifier-free guidance has an unconditional model (arXiv 2207.12598).
    """

    latents: np.ndarray
    text_of: np.ndarray
    texts: Tensor
    caption_dropout: float = 0.1
    noise_offset: float = 0.0
    train_steps: int = 1000

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`clean` and `noise` (B, C, h, w), `t` (B,), `text` (B, T, D)."""
        shape = self.latents.shape[1:]
        noise = torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in rngs]))
        offset = torch.from_numpy(np.stack([g.standard_normal(shape[0], dtype=np.float32) for g in rngs]))
        t = torch.tensor([int(g.integers(self.train_steps)) for g in rngs])
        dropped = np.array([g.random() < self.caption_dropout for g in rngs])
        text_rows = np.where(dropped, 0, self.text_of[rows])
        return {
            "clean": torch.from_numpy(self.latents[rows].astype(np.float32)),
            "noise": offset_noise(noise, offset, self.noise_offset),
            "t": t,
            "text": self.texts[torch.from_numpy(text_rows)].float(),
        }


class DenoiserTask(Task):
    """The weighted mean squared error of the schedule's target."""

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` (weighted) and `mse` (not weighted)."""
        noisy = self.schedule.add_noise(batch["clean"], batch["noise"], batch["t"])
        target = self.schedule.target(batch["clean"], batch["noise"], batch["t"])
        out = self.network(noisy, batch["t"], encoder_hidden_states=batch["text"]).sample
        error = (out - target).square().mean(dim=(1, 2, 3))
        return {"loss": (self.schedule.weight(batch["t"]) * error).mean(), "mse": error.mean()}


# CLIP and T5 of the demo ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairExamples:
    """Images (N, H, W, 3) uint8 with token ids (N, T); `mean` and `std` are CLIP's colour normalization."""

    images: np.ndarray
    ids: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`images` (B, 3, H, W) normalized and `ids` (B, T)."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[rows].transpose(0, 3, 1, 2))).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return {"images": (pixels - mean) / std, "ids": self.ids[torch.from_numpy(rows)]}


class ContrastiveTask(Task):
    """CLIP's symmetric cross entropy over the batch (arXiv 2103.00020); pairs with equal captions are not each other's negatives."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and `top1`, the share of images whose own caption is nearest."""
        image, text, scale = self.network(batch["images"], batch["ids"])[:3]
        logits = scale * image @ text.T
        own = torch.arange(len(logits), device=logits.device)
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1) & (own[:, None] != own[None])
        logits = logits.masked_fill(same, -torch.inf)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"loss": loss, "top1": (logits.argmax(1) == own).float().mean()}


@dataclass(frozen=True)
class CaptionExamples:
    """Token ids (N, T) for span corruption."""

    ids: Tensor
    first_sentinel: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`inputs` and `labels`, both (B, T)."""
        draws = torch.from_numpy(np.stack([g.random(self.ids.shape[1]) for g in rngs]))
        inputs, labels = corrupt_spans(self.ids[torch.from_numpy(rows)], self.first_sentinel, draws)
        return {"inputs": inputs, "labels": labels}


class SpanTask(Task):
    """T5's span corruption."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, nats a token."""
        inputs = batch["inputs"]
        return {
            "loss": self.network(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=batch["labels"]).loss
        }
