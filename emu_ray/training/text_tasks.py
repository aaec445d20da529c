"""What the demo's CLIP and T5 learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emu_ray.models.small_t5 import corrupt_spans
from emu_ray.training.feed import Batch
from emu_ray.training.player import Task


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
