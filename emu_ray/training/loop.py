"""The train function: a plain loop over batches with EMA, schedule, checkpoints and inspection.

Progress is a function of (seed, images seen): which rows a step reads and every random number it uses are keyed by the sample's position
in training, never by a process. A resumed run, on any number of workers, so sees what an undisturbed one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import broadcast_object_list

from emu_ray.config import require_at_least
from emu_ray.errors import NumericsError, RecipeError

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopRecipe:
    """How long and how fast to learn; `batch_size` counts images over all workers."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 1e-2
    adam_beta2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float | None = 0.999
    seed: int = 0
    checkpoint_every_steps: int = field(default=500, metadata={"affects_result": False})
    inspect_every_steps: int | None = None  # runs the inspection, on EMA weights, every so many steps
    log_every_steps: int = field(default=50, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "steps", "batch_size", "checkpoint_every_steps", "inspect_every_steps", "log_every_steps"
        )
        require_at_least(self, 0, "warmup_steps")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise RecipeError(f"ema_decay of LoopRecipe must lie in 0 to 1, or be None, found {self.ema_decay}")
        if not self.learning_rate > 0:
            raise RecipeError(f"learning_rate of LoopRecipe must be above 0, found {self.learning_rate}")


class Examples(Protocol):
    """The training set: `rows` index it, `rngs` (one a sample, keyed by its position in training) are its only randomness."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch: ...


class Task(nn.Module):
    """A network and its loss. Only the parameters of `network` are trained, averaged and saved."""

    network: nn.Module

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: `loss`, and any part worth a curve."""
        raise TypeError("a task states its own loss")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a look at the EMA weights found; a `stop_reason` ends training, the best `score` is kept."""

    metrics: dict[str, float]
    score: float | None = None
    stop_reason: str | None = None


@runtime_checkable
class ResumableInspection(Protocol):
    """An inspection with a memory of earlier looks, such as patience."""

    def __call__(self, step: int, network: nn.Module) -> Inspection: ...

    def resume(self, inspections: list[dict[str, float]]) -> None: ...


class Worker(Protocol):
    """One process of the run: where it computes, and where its progress goes."""

    rank: int
    world_size: int
    device: torch.device

    def restore(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None: ...

    def log(self, metrics: dict[str, float]) -> None: ...


@dataclass(kw_only=True)
class Progress:
    """What a run has reached; goes into each checkpoint."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    inspections: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -math.inf
    best_step: int = 0
    best: dict[str, Tensor] | None = None
    stop_reason: str = ""


def train(
    task: Task,
    examples: Examples,
    recipe: LoopRecipe,
    worker: Worker,
    inspect: Callable[[int, nn.Module], Inspection] | None = None,
) -> Progress:
    """Trains `task.network` in place; all ranks take part and end with the same weights: the best inspected ones, else the EMA's.

    `inspect` is called on rank 0 alone. Raises NumericsError when the loss is not finite (the last checkpoint stays good), RecipeError
    when the set is empty or the workers can't share a batch evenly.
    """
    require_equal_shares(recipe, worker.world_size)
    if len(examples) == 0:
        raise RecipeError(
            "the training set is empty: expected at least one example; look at the counts of the station before it"
        )
    task.to(worker.device).train()
    optimizer = torch.optim.AdamW(
        task.network.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, recipe.adam_beta2),
        weight_decay=recipe.weight_decay,
    )
    average = Average(task.network, recipe.ema_decay)
    progress = Progress()
    saved = worker.restore()
    if saved is not None:
        task.network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load(saved["average"])
        progress = Progress(**saved["progress"])
        if isinstance(inspect, ResumableInspection):
            inspect.resume(progress.inspections)
    stepper = nn.parallel.DistributedDataParallel(task) if worker.world_size > 1 else task
    run = _Run(stepper, task, examples, recipe, worker, optimizer, average)
    while progress.step < recipe.steps and not progress.stop_reason:
        run.step(progress)
        if inspect is not None and _due(progress.step, recipe.inspect_every_steps, recipe.steps):
            _inspect(inspect, average, task, progress, worker)
        if _due(progress.step, recipe.checkpoint_every_steps, recipe.steps) or progress.stop_reason:
            run.checkpoint(progress)
    average.copy_to(task.network)
    if progress.best is not None:
        task.network.load_state_dict(progress.best)
    task.eval()
    return progress


def require_equal_shares(recipe: LoopRecipe, workers: int) -> None:
    """RecipeError unless every worker gets as many images of a batch: their gradients are averaged as equals."""
    if recipe.batch_size % workers:
        raise RecipeError(
            f"batch_size must be a multiple of the number of workers, found {recipe.batch_size} images for {workers} workers: change either"
        )


class Average:
    """Exponential moving average of a network's parameters and buffers; decay None keeps the last weights."""

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves towards the network; the first steps move faster, so that the random start is forgotten."""
        decay = 0.0 if self.decay is None else min(self.decay, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            shadow = self.shadow[name]
            if shadow.is_floating_point():
                shadow.lerp_(value, 1 - decay)
            else:
                shadow.copy_(value)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Puts the averaged weights into the network."""
        network.load_state_dict(self.shadow)

    @contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """The network with averaged weights, put back afterwards."""
        kept = {k: v.detach().clone() for k, v in network.state_dict().items()}
        self.copy_to(network)
        try:
            yield
        finally:
            network.load_state_dict(kept)

    @torch.no_grad()
    def load(self, shadow: dict[str, Tensor]) -> None:
        """Takes the averages of a checkpoint; they stay on the network's device, wherever the checkpoint was read to."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])


@dataclass
class _Run:
    stepper: nn.Module
    task: Task
    examples: Examples
    recipe: LoopRecipe
    worker: Worker
    optimizer: torch.optim.Optimizer
    average: Average
    started: float = field(default_factory=time.monotonic)
    first_step: int | None = None
    recent: list[dict[str, Tensor]] = field(default_factory=list)

    def step(self, progress: Progress) -> None:
        recipe, worker = self.recipe, self.worker
        if self.first_step is None:
            self.first_step = progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(progress.step, recipe)
        start = progress.step * recipe.batch_size
        positions = np.arange(start, start + recipe.batch_size)[worker.rank :: worker.world_size]
        rows = rows_at(positions, len(self.examples), recipe.seed)
        batch = self.examples.batch(rows, [sample_rng(recipe.seed, int(p)) for p in positions])
        losses = self.stepper({k: v.to(worker.device) for k, v in batch.items()})
        loss = losses["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.task.network.parameters(), recipe.clip_norm)
        if not torch.isfinite(
            norm
        ):  # gradients are summed over the workers, so all of them see it and none waits for another
            raise NumericsError(
                f"the gradient became {norm.item()} at step {progress.step + 1} (this worker's loss {loss.item()}, "
                f"training rows {rows[:8].tolist()} ...): the last checkpoint is good; lower the learning rate or look at those rows"
            )
        self.optimizer.step()
        progress.step += 1
        self.average.update(self.task.network, progress.step)
        self.recent.append({**{k: v.detach() for k, v in losses.items()}, "grad_norm": norm.detach()})
        if _due(progress.step, recipe.log_every_steps, recipe.steps):
            self._log(progress)

    def _log(self, progress: Progress) -> None:
        assert self.first_step is not None
        metrics = {k: float(torch.stack([r[k] for r in self.recent]).mean()) for k in self.recent[0]}
        done, elapsed = progress.step - self.first_step, time.monotonic() - self.started
        metrics |= {
            "step": progress.step,
            "images_seen": progress.step * self.recipe.batch_size,
            "images_per_s": done * self.recipe.batch_size / elapsed,
            "eta_s": (self.recipe.steps - progress.step) * elapsed / done,
        }
        self.recent.clear()
        progress.history.append({k: v for k, v in metrics.items() if k != "eta_s"})
        self.worker.log(metrics)

    def checkpoint(self, progress: Progress) -> None:
        state = {
            "network": self.task.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.shadow,
            "progress": vars(progress),
        }
        self.worker.save(state, {"step": progress.step, "images_seen": progress.step * self.recipe.batch_size})


def _inspect(
    inspect: Callable[[int, nn.Module], Inspection], average: Average, task: Task, progress: Progress, worker: Worker
) -> None:
    found = _found(inspect, average, task, progress.step, worker)
    progress.inspections.append({"step": progress.step, **found.metrics})
    progress.stop_reason = found.stop_reason or ""
    if found.score is not None and found.score > progress.best_score:
        progress.best_score, progress.best_step = found.score, progress.step
        progress.best = {k: v.clone() for k, v in average.shadow.items()}
    worker.log({"step": progress.step, **found.metrics})


def _found(
    inspect: Callable[[int, nn.Module], Inspection], average: Average, task: Task, step: int, worker: Worker
) -> Inspection:
    """What rank 0 sees: were each to look for itself, rounding could stop one while the others wait for its gradients."""
    finding: list[Inspection | None] = [None]
    if worker.rank == 0:
        with average.swapped_in(task.network), torch.no_grad():
            task.eval()
            finding[0] = inspect(step, task.network)
            task.train()
    if worker.world_size > 1:
        broadcast_object_list(finding, src=0, device=worker.device)
    assert finding[0] is not None
    return finding[0]


def _due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def learning_rate_at(step: int, recipe: LoopRecipe) -> float:
    """Linear warm-up, then constant or a half cosine to a tenth."""
    warm = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    if recipe.decay == "constant":
        return recipe.learning_rate * warm
    share = min(1.0, step / recipe.steps)
    return recipe.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def rows_at(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The row read at each position of training: epoch after epoch, each a permutation of its own of (seed, epoch)."""
    epochs = positions // size
    rows = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = np.random.default_rng([seed, int(epoch)]).permutation(size)[positions[here] % size]
    return rows


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of the sample at `position` of a training run of `seed`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], dtype=np.uint64)))
