"""The train function: a plain loop over batches with an average of the weights, checkpoints and inspection.

Progress is a function of (seed, images seen): which rows a step reads and every random number it uses are keyed by the sample's position
in training, never by a process. A resumed run, on any number of workers, so sees what an undisturbed one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emu_ray.config import require_at_least
from emu_ray.errors import DivergedError, MemoryShortError, RecipeError
from emu_ray.training.average import Average, put
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.feed import Ahead, Batch, Examples, Feed, MemoryFeed, Share
from emu_ray.training.meters import Meter, communication_share, flops_per_image, peak_tflops
from emu_ray.training.order import BatchPlan
from emu_ray.training.parallel import ParallelRecipe, skeleton_of
from emu_ray.training.player import AdamWSettings, Player, Task


@dataclass(frozen=True, kw_only=True)
class LoopRecipe:
    """How long and how fast to learn; `batch_size` counts images over all workers."""

    steps: int
    batch_size: int = 64
    # Batch sizes of single buckets, where they differ from `batch_size`, by name: --bucket-batch-sizes 512x512 64 640x384 72
    bucket_batch_sizes: dict[str, int] = field(default_factory=dict)
    # Samples a worker computes at once; gradients are summed up to its share of the batch. None: the whole share.
    micro_batch_size: int | None = field(default=None, metadata={"affects_result": False})
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 1e-2
    adam_beta2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float | None = 0.999
    seed: int = 0
    parallel: ParallelRecipe = ParallelRecipe()
    checkpoint_every_steps: int = field(default=500, metadata={"affects_result": False})
    # At least so often, whatever a step takes: what a kill may cost.
    checkpoint_every_s: float = field(default=60.0, metadata={"affects_result": False})
    inspect_every_steps: int | None = None  # runs the inspection, on EMA weights, every so many steps
    # Draws sample pictures of the averaged weights every so many images seen.
    show_every_images: int | None = field(default=None, metadata={"affects_result": False})
    log_every_steps: int = field(default=50, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "steps", "batch_size", "micro_batch_size", "checkpoint_every_steps", "inspect_every_steps",
            "show_every_images", "log_every_steps",
        )  # fmt: skip
        require_at_least(self, 0, "warmup_steps", "weight_decay", "seed")
        if not 0 <= self.adam_beta2 < 1:
            raise RecipeError(f"adam_beta2 of LoopRecipe must lie in 0 to below 1, found {self.adam_beta2}")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise RecipeError(f"ema_decay of LoopRecipe must lie in 0 to 1, or be None, found {self.ema_decay}")
        for name in ("learning_rate", "clip_norm", "checkpoint_every_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"{name} of LoopRecipe must be above 0 and finite, found {getattr(self, name)}")


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


@runtime_checkable
class ComparingInspection(Protocol):
    """An inspection that compares with the weights that training starts from, which it sees as it sees all others."""

    def measure(self, step: int, network: nn.Module) -> dict[str, float]: ...

    def compare_with(self, base: dict[str, float]) -> None: ...


class Worker(Protocol):
    """One process of the run: where it computes, and where its progress goes."""

    rank: int
    world_size: int
    device: torch.device

    def checkpoints(self) -> Checkpoints | None:
        """Where to resume from and save to, asked for once; None keeps nothing."""
        ...

    def log(self, metrics: dict[str, float]) -> None:
        """Takes the figures of a few steps, or of a look; called on all ranks with equal ones."""
        ...

    def publish(self, is_last: bool = False) -> None:
        """Hands what was logged to the run's curves, and may wait until it is taken; called on all ranks together."""
        ...

    def is_ending(self) -> bool:
        """Whether its machine will soon be taken away; all ranks ask together and get one answer."""
        ...


@dataclass(kw_only=True)
class Progress:
    """What a run has reached; goes into each checkpoint."""

    step: int = 0
    images_seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    inspections: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -math.inf
    best_step: int = 0
    stop_reason: str = ""
    base: dict[str, float] | None = None  # what a comparing inspection measured before the first step
    began: float | None = None  # Unix time of the run's first start
    useful_s: float = 0.0


ASK_EVERY_S = 15.0  # whether a machine will be taken away: spot machines are announced two minutes ahead
PUBLISH_EVERY_S = 5.0  # Ray Train takes one report every two seconds, and lets a worker with another one wait

Look = Callable[[int, nn.Module], Inspection]
Show = Callable[[int, nn.Module], None]  # images seen, and the network with averaged weights


def train(
    task: Task,
    data: Examples | Mapping[str, Examples] | Feed,
    recipe: LoopRecipe,
    worker: Worker,
    inspect: Look | None = None,
    show: Show | None = None,
) -> Progress:
    """Trains `task.network`; all ranks take part. In the end it holds the best inspected weights, else the average's.

    With sharded weights `task.network` is replaced by a whole one, filled on rank 0 alone, and `inspect` and `show` are called on every
    rank, for each holds a part; else on rank 0 alone. Raises DivergedError when the gradient is not finite (the last checkpoint stays good),
    CheckpointError when none can be read, MemoryShortError when a GPU has too little, RecipeError when the set is empty or a batch has fewer images than there are workers.
    """
    require_shares(recipe, worker.world_size)
    feed = data if hasattr(data, "shares") else _in_memory(data, recipe, worker)  # type: ignore[arg-type]
    try:
        run = _Run(task, feed, recipe, worker, inspect, show)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise MemoryShortError(
            "the weights and their average don't fit into this worker's GPU: shard with sharding 'fsdp' over more GPUs; `python -m jobs.pretrain --plan` counts"
        ) from error
    try:
        return run.through()
    except torch.OutOfMemoryError as error:
        raise MemoryShortError(
            f"this worker ran out of GPU memory after step {run.progress.step}, beside a pass (a look, a sheet of samples, encoding, or the update): "
            "shard with sharding 'fsdp', lower stopping.batch_size or the guard's and samples' pictures; the last checkpoint is good"
        ) from error
    finally:
        run.close()


def require_shares(recipe: LoopRecipe, workers: int) -> None:
    """RecipeError unless every worker gets an image of each batch. Shares may differ by one: gradients are weighted by them."""
    for size in (recipe.batch_size, *recipe.bucket_batch_sizes.values()):
        if size < workers:
            raise RecipeError(
                f"batch_size must be at least the number of workers, found {size} images for {workers} workers: change either"
            )
        if size % workers and recipe.micro_batch_size == 1:
            raise RecipeError(
                f"micro_batch_size 1 needs a batch_size that is a multiple of the number of workers, found {size} images for {workers} workers: "
                "a worker with one image less would run out before the others; change either"
            )


def _in_memory(examples: Examples | Mapping[str, Examples], recipe: LoopRecipe, worker: Worker) -> MemoryFeed:
    buckets = examples if isinstance(examples, Mapping) else {"": examples}
    return MemoryFeed(
        buckets, plan_of({name: len(part) for name, part in buckets.items()}, recipe), worker.rank, worker.world_size
    )


def plan_of(rows: Mapping[str, int], recipe: LoopRecipe) -> BatchPlan:
    """The order of a set with so many rows in each bucket; RecipeError when one is empty, or a batch size names none of them."""
    unknown = sorted(recipe.bucket_batch_sizes.keys() - rows.keys())
    if unknown:
        raise RecipeError(
            f"bucket_batch_sizes names the bucket {unknown[0]}, which has no images: found {', '.join(sorted(rows)) or 'none'}"
        )
    return BatchPlan(rows, {name: recipe.bucket_batch_sizes.get(name, recipe.batch_size) for name in rows}, recipe.seed)


class _Run:
    """One process's way through the steps."""

    def __init__(
        self, task: Task, feed: Feed, recipe: LoopRecipe, worker: Worker, inspect: Look | None, show: Show | None
    ) -> None:
        self.task, self.feed, self.recipe, self.worker = task, feed, recipe, worker
        self.inspect, self.show = inspect, show
        adamw = AdamWSettings(
            learning_rate=recipe.learning_rate, beta2=recipe.adam_beta2, weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm
        )  # fmt: skip
        self.skeleton = None if peak_tflops(worker.device) is None else skeleton_of(task.network)
        opponent, task.opponent = task.opponent, None  # so that each is moved, wrapped and trained by itself
        self.player = Player(task, recipe.parallel, adamw, worker.world_size, worker.device)
        self.opponent = (
            None if opponent is None else Player(opponent, recipe.parallel, adamw, worker.world_size, worker.device)
        )
        task.opponent = opponent
        self.average = Average(task.network, recipe.ema_decay)
        self.best: dict[str, Tensor] | None = None
        self.checkpoints = worker.checkpoints()
        self.progress = Progress()
        self._restore()
        self.meter = Meter(worker.device, worker.world_size, self.progress.useful_s, self.progress.began)
        self.progress.began = self.meter.began
        self.recent: list[dict[str, Tensor]] = []
        self.was_warned = False
        self.pace, self.saved_at, self.published_at = 0.0, self.progress.step, self.progress.step

    def through(self) -> Progress:
        """Every step that is left, then the final weights."""
        progress, recipe = self.progress, self.recipe
        self.task.train()
        self._measure_base()
        with Ahead(self.feed, progress.step, recipe.steps) as ahead:
            while progress.step < recipe.steps and not progress.stop_reason:
                with self.meter.timing("data"):
                    share = ahead.take()
                self._step(share)
                done = progress.step - self.first_step
                if done in (2, 20) or _due(progress.step, recipe.log_every_steps, recipe.steps):
                    self.pace = self._agreed_pace()
                if _due(progress.step, recipe.log_every_steps, recipe.steps):
                    self._log()
                ending = done % self._steps_in(ASK_EVERY_S, recipe.log_every_steps) == 0 and self.worker.is_ending()
                self._look()
                every = self._steps_in(recipe.checkpoint_every_s, recipe.checkpoint_every_steps)
                due = progress.step - self.saved_at >= every or progress.step % recipe.checkpoint_every_steps == 0
                saves = ending or bool(progress.stop_reason) or due or progress.step == recipe.steps
                self._publish(
                    at_once=saves
                )  # what a checkpoint holds is logged: a resumed run doesn't come there again
                if saves:
                    self._checkpoint(at_once=ending and not self.was_warned)
                    self.was_warned |= (
                        ending  # until the machine goes, each reading is followed by one more, beside the steps
                    )
        self._finish()
        return progress

    def _agreed_pace(self) -> float:
        """Seconds a step takes, of the slowest worker; all ranks get the same, and so decide alike."""
        seconds = torch.tensor(self.meter.seconds_a_step(), device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def _steps_in(self, seconds: float, most: int) -> int:
        """How many steps fit into so many seconds, at least 1 and at most `most`."""
        return max(1, min(most, int(seconds / self.pace))) if self.pace > 0 else most

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self.checkpoints is not None:
            self.checkpoints.close()

    def _step(self, share: Share) -> None:
        progress, meter = self.progress, self.meter
        batch = {
            name: value.to(self.worker.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in share.batch.items()
        }
        reads = self.feed.plan.at(progress.step)
        with meter.timing("encode"), torch.no_grad():
            batch = self.task.encode(batch)
        with meter.timing("compute"):
            losses = self._measured(lambda: self._gradients(batch, share), batch)
        if self.checkpoints is not None:
            with meter.timing("checkpoint"):
                self.checkpoints.wait_until_copied()
        with meter.timing("update"):
            rate = learning_rate_at(progress.step, self.recipe)
            self.player.update(rate)
            if self.opponent is not None:
                self.opponent.update(rate)
            progress.step += 1
            progress.images_seen = reads.images_seen + reads.size
            self.average.update(progress.step)
        meter.count(reads.size)
        self.recent.append(losses)

    def _gradients(self, batch: Batch, share: Share) -> dict[str, Tensor]:
        """Both players' gradients, clipped, and their losses; NumericsError on all ranks when one isn't finite."""
        parts = self._parts(batch)
        self.task.step = self.progress.step
        weight = len(share.names) * self.worker.world_size / self.feed.plan.at(self.progress.step).size
        losses, made = self.player.backward(parts, weight)
        losses["grad_norm"] = self.player.clip()
        norms = [losses["grad_norm"]]
        if self.opponent is not None:
            self.opponent.task.step = self.progress.step
            shown = [{**part, "made": product} for part, product in zip(parts, made, strict=True)]
            theirs, _ = self.opponent.backward(shown, weight)
            theirs["grad_norm"] = self.opponent.clip()
            norms.append(theirs["grad_norm"])
            losses |= {f"opponent_{name}": value for name, value in theirs.items()}
        if not all(
            torch.isfinite(norm) for norm in norms
        ):  # summed over the workers: all of them see it, and none waits for another
            broke = self._what_broke(losses, share)
            self.worker.publish(is_last=True)
            raise DivergedError(broke)
        return losses

    def _parts(self, batch: Batch) -> list[Batch]:
        """The share in passes of at most `micro_batch_size`, as many on each worker: sharded weights are gathered together."""
        largest = -(-self.feed.plan.at(self.progress.step).size // self.worker.world_size)
        passes = -(-largest // (self.recipe.micro_batch_size or largest))
        if passes == 1:
            return [batch]
        split = {name: torch.tensor_split(value, passes) for name, value in batch.items()}
        return [{name: pieces[i] for name, pieces in split.items()} for i in range(passes)]

    def _measured(self, gradients: Callable[[], dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """The gradients' losses; counts operations at the first step of this process, and the exchanges' share at the tenth."""
        found: dict[str, Tensor] = {}
        step = self.progress.step - self.first_step
        if step == 0 and self.skeleton is not None:
            self.meter.flops_per_image = flops_per_image(
                self.task, self.skeleton, self._parts(batch)[0], self.worker.device
            )
            self.skeleton = None
        if step == 9 and self.worker.world_size > 1:
            self.meter.communication_share = communication_share(lambda: found.update(gradients()), self.worker.device)
        else:
            found = gradients()
        return found

    def _what_broke(self, losses: dict[str, Tensor], share: Share) -> str:
        mine = (self.worker.rank, float(losses["loss"]), share.names)
        every: list[Any] = [mine]
        if self.worker.world_size > 1:
            every = [None] * self.worker.world_size
            dist.all_gather_object(every, mine)
        bad = [one for one in every if not math.isfinite(one[1])] or every
        told = "; ".join(
            f"worker {rank}: loss {loss}, {', '.join(names[:16])}{' ...' if len(names) > 16 else ''}"
            for rank, loss, names in bad[:4]
        )
        return (
            f"the gradient became {float(losses['grad_norm'])} at step {self.progress.step + 1}, after {self.progress.images_seen} images "
            f"({told}): the last checkpoint is good; lower the learning rate or look at those pictures"
        )

    def _log(self) -> None:
        progress, recipe = self.progress, self.recipe
        names = list(self.recent[0])
        means = torch.stack([torch.stack([r[name].float() for r in self.recent]).mean() for name in names])
        if self.worker.world_size > 1:
            dist.all_reduce(means, op=dist.ReduceOp.SUM)
            means /= self.worker.world_size
        metrics = dict(zip(names, means.tolist(), strict=True)) | self.meter.read()
        progress.useful_s = self.meter.useful_s
        left = self.feed.plan.images_seen(recipe.steps) - progress.images_seen
        metrics |= {
            "step": progress.step,
            "images_seen": progress.images_seen,
            "learning_rate": learning_rate_at(progress.step - 1, recipe),
        }
        self.recent.clear()
        progress.history.append(dict(metrics))
        self.worker.log(metrics | {"eta_s": left / metrics["images_per_s"]})

    def _publish(self, at_once: bool) -> None:
        progress, every = self.progress, self._steps_in(PUBLISH_EVERY_S, self.recipe.steps)
        if at_once or progress.step - self.published_at >= every:
            self.worker.publish(is_last=progress.step == self.recipe.steps or bool(progress.stop_reason))
            self.published_at = progress.step

    def _look(self) -> None:
        """Inspection and sample pictures, where they are due, with averaged weights."""
        progress, recipe, every = self.progress, self.recipe, self.recipe.show_every_images
        if self.inspect is not None and _due(progress.step, recipe.inspect_every_steps, recipe.steps):
            with self.meter.paused():
                found = self._found()
            progress.inspections.append({"step": progress.step, **found.metrics})
            progress.stop_reason = found.stop_reason or ""
            if found.score is not None and found.score > progress.best_score:
                progress.best_score, progress.best_step = found.score, progress.step
                self.best = {name: value.clone() for name, value in self.average.shadow.items()}
            self.worker.log({"step": progress.step, "images_seen": progress.images_seen, **found.metrics})
        if self.show is not None and every is not None:
            before = self.feed.plan.at(progress.step - 1).images_seen
            if progress.images_seen // every > before // every:
                with self.meter.paused():
                    self._on_average(lambda _, network: self.show(progress.images_seen, network))  # type: ignore[misc]

    def _measure_base(self) -> None:
        """Before the first step, for inspections that compare; a restart goes on with what was measured then."""
        if self.inspect is None or self.progress.step == self.recipe.steps:
            return
        if self.progress.base is None:
            with self.meter.paused():
                self.progress.base = self._of_first(self._on_average(self._base_of))
        if isinstance(self.inspect, ComparingInspection) and self.progress.base:
            self.inspect.compare_with(self.progress.base)

    def _base_of(self, step: int, network: nn.Module) -> dict[str, float]:
        return self.inspect.measure(step, network) if isinstance(self.inspect, ComparingInspection) else {}

    def _found(self) -> Inspection:
        """What rank 0 sees: were each to look for itself, rounding could stop one while the others wait for its gradients."""
        assert self.inspect is not None
        found: Inspection = self._of_first(self._on_average(self.inspect))
        return found

    def _of_first(self, value: Any) -> Any:
        """Rank 0's, on every rank."""
        held = [value]
        if self.worker.world_size > 1:
            dist.broadcast_object_list(held, src=0, device=self.worker.device)
        return held[0]

    def _on_average(self, look: Callable[[int, nn.Module], Any]) -> Any:
        is_sharded = self.player.spread.is_sharded
        if self.worker.rank != 0 and not is_sharded:
            return None
        if self.checkpoints is not None:
            self.checkpoints.wait_until_copied()
        with self.average.swapped_in(), torch.no_grad(), self.player.spread.computing():
            self.task.eval()
            try:
                return look(self.progress.step, self.task.network)
            finally:
                self.player.spread.rest()
                self.task.train()

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What every checkpoint holds, and what it holds once something was found best."""
        found = self.player.tensors() | {f"average.{name}": value for name, value in self.average.shadow.items()}
        if self.opponent is not None:
            found |= {f"opponent.{name}": value for name, value in self.opponent.tensors().items()}
        return found, {f"best.{name}": value for name, value in (self.best or {}).items()}

    def _checkpoint(self, at_once: bool) -> None:
        if self.checkpoints is None:
            return
        always, best = self._tensors()
        self.saved_at = self.progress.step
        with self.meter.timing("checkpoint"):
            self.checkpoints.save(always | best, self.progress.step, vars(self.progress))
            if at_once:
                self.checkpoints.wait()

    def _restore(self) -> None:
        if self.checkpoints is None:
            self.first_step = 0
            return
        self.best = {name: torch.zeros_like(value) for name, value in self.average.shadow.items()}
        always, best = self._tensors()
        saved = self.checkpoints.load(always, best)
        if saved is not None:
            self.progress = Progress(**saved)
            if isinstance(self.inspect, ResumableInspection):
                self.inspect.resume(self.progress.inspections)
        if self.progress.best_step == 0:
            self.best = None
        self.first_step = self.progress.step

    def _finish(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.wait()
        self.average.copy_to_network()
        if self.best is not None:
            put(self.best, self.task.network)
        self.task.network = self.player.spread.gathered(self.worker.rank)
        self.task.eval()


def _due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def learning_rate_at(step: int, recipe: LoopRecipe) -> float:
    """Linear warm-up, then constant, or a line or half a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    share = min(1.0, step / recipe.steps)
    falls = {"constant": 1.0, "linear": 1 - 0.9 * share, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * share))}
    return recipe.learning_rate * warm * falls[recipe.decay]
