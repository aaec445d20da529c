"""What a worker reads at each step, made ahead of it by a thread so that the step doesn't wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from emu_ray.training.order import BatchPlan, rows_at, sample_rng

# Tensors with the sample along the first axis; what a task's `encode` turns into tensors may be a list.
Batch = dict[str, Any]


class Examples(Protocol):
    """Pictures of one size: `rows` index them, `rngs` (one a sample, keyed by its position in training) are their only randomness."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch: ...


@runtime_checkable
class Named(Protocol):
    """Examples whose rows have names by which a user finds them."""

    def names(self, rows: np.ndarray) -> list[str]: ...


@dataclass(frozen=True)
class Share:
    """One worker's share of a step's batch: tensors with the sample along the first axis, and what the samples are called."""

    batch: Batch
    names: list[str]


class Feed(Protocol):
    """A training set as one worker sees it: its share of the step's batch, as `plan` orders it."""

    plan: BatchPlan

    def shares(self, first_step: int, last_step: int) -> Iterator[Share]:
        """The shares of the steps from `first_step` up to but not including `last_step`."""
        ...


class MemoryFeed:
    """A set of which every worker holds all: rows are drawn one by one."""

    def __init__(
        self, examples: Examples | Mapping[str, Examples], plan: BatchPlan, rank: int, world_size: int
    ) -> None:
        """`examples` by bucket, as in `plan`; a set of one bucket may stand alone."""
        self.examples = examples if isinstance(examples, Mapping) else {plan.buckets[0]: examples}
        self.plan, self.rank, self.world_size = plan, rank, world_size

    def shares(self, first_step: int, last_step: int) -> Iterator[Share]:
        """In memory: made when asked for."""
        for step in range(first_step, last_step):
            yield self.share(step)

    def share(self, step: int) -> Share:
        """This worker's share of one step."""
        reads, plan = self.plan.at(step), self.plan
        mine = np.arange(self.rank, reads.size, self.world_size)
        examples = self.examples[reads.bucket]
        rows = rows_at(reads.in_bucket + mine, len(examples), plan.seed, plan.buckets.index(reads.bucket))
        batch = examples.batch(rows, [sample_rng(plan.seed, int(reads.images_seen + i)) for i in mine])
        names = examples.names(rows) if isinstance(examples, Named) else [f"row {row}" for row in rows]
        return Share(batch, names)


class Ahead:
    """The shares of a feed in the order of their steps, up to `depth` of them made ahead by a thread; use it with `with`."""

    def __init__(self, feed: Feed, first_step: int, last_step: int, depth: int = 2) -> None:
        self._made: queue.Queue[Share | BaseException | None] = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(feed, first_step, last_step), name="feed", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._made.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def take(self) -> Share:
        """The next step's share; raises what making it raised."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        assert made is not None, "the loop asks for no more steps than it announced"
        return made

    def _make(self, feed: Feed, first_step: int, last_step: int) -> None:
        try:
            for share in feed.shares(first_step, last_step):
                self._made.put(share)
                if self._ended.is_set():
                    return
            self._made.put(None)
        except BaseException as error:  # it belongs to the thread that takes
            self._made.put(error)
