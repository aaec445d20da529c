"""The held-out loss: the same number however many pairs are computed at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emu_ray.training.denoising import LatentExamples
from emu_ray.training.stopping import HeldOutLoss, StoppingRecipe


class Noting(nn.Module):
    """A loss of what it is given, which notes how many pairs each pass has."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.passes: list[int] = []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.passes.append(len(batch["clean"]))
        off = (batch["clean"] - batch["noise"]).square().mean((1, 2, 3))
        return {"mse": (off * (1 + batch["t"])).mean()}


def _looked(batch_size: int) -> tuple[float, list[int]]:
    task, rng = Noting(), np.random.default_rng(0)
    buckets = [
        LatentExamples(rng.normal(size=(count, 4, 4, 4)).astype(np.float16), np.zeros(count, int), torch.zeros(1, 2, 3))
        for count in (7, 5)
    ]
    loss = HeldOutLoss(task, buckets, StoppingRecipe(draws=2, batch_size=batch_size), seed=1)  # type: ignore[arg-type]
    return loss(1, task.network).metrics["held_out_mse"], task.passes


def test_pairs_are_computed_a_few_at_once_and_how_many_changes_nothing() -> None:
    (few, small), (many, large) = _looked(3), _looked(100)
    assert (small, large) == ([3, 3, 1] * 2 + [3, 2] * 2, [7] * 2 + [5] * 2)
    assert few == pytest.approx(many, rel=1e-6)
