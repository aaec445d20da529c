"""What the U-Net learns: latents with noise, and captions of which some are dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from emu_ray.diffusion.schedule import NoiseSchedule, offset_noise
from emu_ray.models.denoiser import conditions
from emu_ray.models.text import TextFeatures
from emu_ray.training.feed import Batch
from emu_ray.training.player import Task


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How a clean sample is made a training sample.

    `caption_dropout` is the share of samples that get no caption, so that classifier-free guidance has an unconditional model
    (arXiv 2207.12598).
    """

    caption_dropout: float = 0.1
    noise_offset: float = 0.0
    train_steps: int = 1000

    def draw(self, shape: tuple[int, ...], rngs: list[np.random.Generator]) -> tuple[Tensor, Tensor, np.ndarray]:
        """Of each sample: noise (B, *shape) with its offset, step `t` (B,), and whether its caption is dropped (B,)."""
        noise = torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in rngs]))
        offset = torch.from_numpy(np.stack([g.standard_normal(shape[0], dtype=np.float32) for g in rngs]))
        t = torch.tensor([int(g.integers(self.train_steps)) for g in rngs])
        dropped = np.array([g.random() < self.caption_dropout for g in rngs])
        return offset_noise(noise, offset, self.noise_offset), t, dropped


@dataclass(frozen=True)
class LatentExamples:
    """Normalized latents (N, C, h, w) with text features by caption.

    `text_of` (N,) indexes `texts` (M, T, D) and `pooled` (M, P); row 0 of both says that there is no caption. `pooled` and `time_ids` (N, 6)
    are there for U-Nets that are told sizes and crops, and for no other. `keys` (N,) name the pairs in messages.
    """

    latents: np.ndarray
    text_of: np.ndarray
    texts: Tensor
    corruption: Corruption = Corruption()
    pooled: Tensor | None = None
    time_ids: np.ndarray | None = None
    keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: np.ndarray) -> LatentExamples:
        """The pairs at these indices, in their order."""
        ids, keys = (None if column is None else column[rows] for column in (self.time_ids, self.keys))
        return replace(self, latents=self.latents[rows], text_of=self.text_of[rows], time_ids=ids, keys=keys)

    def names(self, rows: np.ndarray) -> list[str]:
        """The keys of the pairs, as the station has them."""
        return [f"row {row}" if self.keys is None else f"key {self.keys[row]}" for row in rows]

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`clean` and `noise` (B, C, h, w), `t` (B,), `text` (B, T, D), and `pooled` (B, P) with `time_ids` (B, 6) where there are any."""
        noise, t, dropped = self.corruption.draw(self.latents.shape[1:], rngs)
        text_rows = torch.from_numpy(np.where(dropped, 0, self.text_of[rows]))
        batch = {
            "clean": torch.from_numpy(self.latents[rows].astype(np.float32)),
            "noise": noise,
            "t": t,
            "text": self.texts[text_rows].float(),
        }
        if self.time_ids is not None:
            assert self.pooled is not None
            batch["pooled"] = self.pooled[text_rows].float()
            batch["time_ids"] = torch.from_numpy(self.time_ids[rows].astype(np.float32))
        return batch


class DenoiserTask(Task):
    """The weighted mean squared error of the schedule's target."""

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, features: Callable[[list[str]], TextFeatures] | None = None
    ) -> None:
        """`features` (captions to what the U-Net is told; the first of what it gives is that of no caption) is for batches of captions."""
        super().__init__()
        self.network, self.schedule, self.features = network, schedule, features

    def encode(self, batch: Batch) -> Batch:
        """Puts `text`, and `pooled` where sizes are told, in place of `captions`, a list in which None is a dropped one."""
        if "captions" not in batch:
            return batch
        assert self.features is not None
        captions = batch["captions"]
        found = self.features([caption for caption in captions if caption is not None])
        row, rows = 0, []
        for caption in captions:
            row += caption is not None
            rows.append(row if caption is not None else 0)
        device = batch["clean"].device
        rest = {name: value for name, value in batch.items() if name != "captions"}
        rest["text"] = found.tokens_BTD.float().to(device)[rows]
        if "time_ids" in batch:
            assert found.pooled_BD is not None
            rest["pooled"] = found.pooled_BD.float().to(device)[rows]
        return rest

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` (weighted) and `mse` (not weighted)."""
        noisy = self.schedule.add_noise(batch["clean"], batch["noise"], batch["t"])
        target = self.schedule.target(batch["clean"], batch["noise"], batch["t"])
        told = conditions(TextFeatures(batch["text"], batch.get("pooled")), batch.get("time_ids"))
        out = self.network(noisy, batch["t"], **told).sample
        error = (out - target).square().mean(dim=(1, 2, 3))
        return {"loss": (self.schedule.weight(batch["t"]) * error).mean(), "mse": error.mean()}
