"""Which pictures a step reads, and their randomness: functions of (seed, images seen) alone, never of a process or of a worker's rank.

A set is divided into buckets (pictures of one size); a step takes a batch of one of them. Over a *round* every bucket comes as often as its
share of the pictures asks, in an order drawn from (seed, round). Inside a bucket, epoch after epoch is a permutation of its own of
(seed, bucket, epoch): any two orders of a bucket are equally likely, the best that a shuffle can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from emu_ray.errors import RecipeError

UNEVEN = 0.02  # how much more often than its share a bucket may come
STEPS_A_ROUND = (
    1_000_000  # where this is not enough for that, pictures of very rare buckets come more often than others
)


@dataclass(frozen=True)
class StepReads:
    """What a step reads: `size` pictures of `bucket`, from position `in_bucket` of its order; `images_seen` came before it."""

    bucket: str
    size: int
    in_bucket: int
    images_seen: int


class BatchPlan:
    """The bucket and the positions of every step."""

    def __init__(self, rows: Mapping[str, int], batch_size: int | Mapping[str, int], seed: int) -> None:
        """`rows` counts the pictures of each bucket; `batch_size` counts images over all workers.

        Raises RecipeError for no buckets, an empty one, or one without a batch size.
        """
        if not rows or not all(rows.values()):
            empty = ", ".join(name for name, count in rows.items() if not count) or "none given"
            raise RecipeError(
                f"the training set is empty: expected at least one example in each bucket, found none in {empty}; "
                "look at the counts of the station before it"
            )
        self.buckets = sorted(rows)
        sizes = dict.fromkeys(rows, batch_size) if isinstance(batch_size, int) else dict(batch_size)
        missing = [name for name in self.buckets if name not in sizes]
        if missing:
            raise RecipeError(
                f"no batch size is given for the bucket {missing[0]}: expected one for each of {', '.join(self.buckets)}"
            )
        if bad := [name for name in self.buckets if sizes[name] < 1]:
            raise RecipeError(f"the batch size of bucket {bad[0]} must be at least 1, found {sizes[bad[0]]}")
        self.rows, self.sizes, self.seed = dict(rows), sizes, seed
        batches = np.array([rows[name] / sizes[name] for name in self.buckets])
        self._times = _steps_of_a_round(batches)
        self._images = np.array([sizes[name] for name in self.buckets])
        self._drawn: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def steps_a_round(self) -> int:
        """After so many steps each bucket has come as often as it should."""
        return int(self._times.sum())

    def at(self, step: int) -> StepReads:
        """What step number `step`, counted from 0, reads."""
        round_, place = divmod(step, self.steps_a_round)
        order, earlier, images = self._round(round_)
        bucket = int(order[place])
        return StepReads(
            bucket=self.buckets[bucket],
            size=int(self._images[bucket]),
            in_bucket=int((round_ * self._times[bucket] + earlier[place]) * self._images[bucket]),
            images_seen=int(round_ * (self._times * self._images).sum() + images[place]),
        )

    def images_seen(self, step: int) -> int:
        """Images that the first `step` steps read."""
        return self.at(step).images_seen

    def _round(self, round_: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each step of a round: its bucket's number, how many steps of the bucket came before it, and how many images."""
        drawn = self._drawn  # two threads ask: the step's, and the one that reads ahead
        if drawn is None or drawn[0] != round_:
            order = np.repeat(np.arange(len(self.buckets)), self._times)
            if len(self.buckets) > 1:
                order = np.random.default_rng([self.seed, 17, round_]).permutation(order)
            earlier = np.empty(len(order), np.int64)
            for bucket in range(len(self.buckets)):
                here = order == bucket
                earlier[here] = np.arange(here.sum())
            sizes = self._images[order]
            drawn = self._drawn = (round_, order, earlier, np.cumsum(sizes) - sizes)
        return drawn[1:]


def _steps_of_a_round(batches: np.ndarray) -> np.ndarray:
    """How many steps of each bucket make a round, of buckets of so many batches: the fewest epochs that are whole batches, nearly."""
    epochs = 1
    while True:
        wanted = batches * epochs
        times = np.round(wanted)
        is_near = bool((times > 0).all()) and float(np.abs(times / wanted - 1).max()) <= UNEVEN
        if is_near or batches.sum() * (epochs + 1) > STEPS_A_ROUND:
            return np.maximum(1, times).astype(np.int64)
        epochs += 1


def rows_at(positions: np.ndarray, size: int, seed: int, bucket: int = 0) -> np.ndarray:
    """The row read at each position of a bucket's order: epoch after epoch, each a permutation of its own of (seed, epoch, bucket)."""
    epochs = positions // size
    rows = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        keys = [seed, int(epoch)] if bucket == 0 else [seed, int(epoch), bucket]
        rows[here] = np.random.default_rng(keys).permutation(size)[positions[here] % size]
    return rows


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of the sample at `position`, counted in images seen, of a training run of `seed`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], dtype=np.uint64)))
