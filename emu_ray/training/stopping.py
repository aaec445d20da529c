"""When quality-tuning ends: a loss on pairs that are never trained on, with frozen noise and steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.feed import Batch
from emu_ray.training.loop import Inspection
from emu_ray.training.order import sample_rng


@dataclass(frozen=True, kw_only=True)
class StoppingRecipe:
    """When quality-tuning ends: `held_out` of the pairs are never trained on; the loss on them decides."""

    held_out: float = 0.1  # share of the pairs, 0 to 1
    patience: int = 4  # inspections without improvement
    draws: int = 8  # frozen (noise, step) draws of every held-out pair
    batch_size: int = field(default=16, metadata={"affects_result": False})  # pairs computed at once

    def __post_init__(self) -> None:
        require_at_least(self, 1, "patience", "draws", "batch_size")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out of StoppingRecipe must lie above 0 and below 1, found {self.held_out}")


class HeldOutLoss:
    """Inspection by the mean squared error on held-out pairs with frozen noise and steps; lower is better."""

    def __init__(self, task: DenoiserTask, held_out: list[LatentExamples], stopping: StoppingRecipe, seed: int) -> None:
        """`held_out` by bucket; each pair counts as much."""
        self.task, self.held_out, self.stopping, self.seed = task, held_out, stopping, seed
        self.pairs = sum(len(examples) for examples in held_out)
        self.seen: list[float] = []  # in this process; what came before a resume is handed over by `resume`

    def _frozen(self, examples: LatentExamples, rows: np.ndarray, draw: int, before: int) -> Batch:
        """One draw of these pairs, of which `before` others come first; the steps evenly spread instead of drawn, for less noise in the measure."""
        places, draws = before + rows, self.stopping.draws
        batch = examples.batch(rows, [sample_rng(self.seed + 1, draw * self.pairs + int(place)) for place in places])
        spread = (places * draws + draw + 0.5) / (self.pairs * draws)
        batch["t"] = torch.from_numpy((spread * examples.corruption.train_steps).astype(np.int64))
        return batch

    def __call__(self, step: int, network: nn.Module) -> Inspection:
        """One look at the network as it is."""
        device, total = next(network.parameters()).device, 0.0
        for batch in self._batches():
            mse = self.task({name: value.to(device) for name, value in batch.items()})["mse"]
            total += float(mse) * len(batch["clean"])
        loss = total / (self.pairs * self.stopping.draws)
        self.seen.append(loss)
        since_best = len(self.seen) - 1 - int(np.argmin(self.seen))
        reason = None
        if since_best >= self.stopping.patience:
            reason = f"the held-out loss has not improved for {since_best} inspections (best {min(self.seen):.4f})"
        return Inspection(metrics={"held_out_mse": loss}, score=-loss, stop_reason=reason)

    def _batches(self) -> Iterator[Batch]:
        """All draws of all pairs, a few at once: they share the GPU with the optimizer."""
        before = 0
        for examples in self.held_out:
            for draw in range(self.stopping.draws):
                for at in range(0, len(examples), self.stopping.batch_size):
                    rows = np.arange(at, min(at + self.stopping.batch_size, len(examples)))
                    yield self._frozen(examples, rows, draw, before)
            before += len(examples)

    def resume(self, inspections: list[dict[str, float]]) -> None:
        """Takes over what earlier processes of the run found, so that patience counts on."""
        self.seen = [found["held_out_mse"] for found in inspections]
