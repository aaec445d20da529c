"""What the U-Net learns: latents with noise, and captions of which some are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from emu_ray.diffusion.schedule import NoiseSchedule, offset_noise
from emu_ray.training.loop import Batch, Task


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
