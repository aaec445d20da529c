"""Which rows of a large set follow each other, so that each worker reads few files, and any number of workers reads the same.

The row groups of a bucket are dealt to *lanes* once, by the seed. Position q of a bucket's order lies in lane q mod L, as the lane's row
number q div L: a worker whose number divides L reads lanes that no other reads. Over an epoch a lane goes through its row groups in an
order of its own, `window_groups` at a time, whose rows it mixes.

Shuffle quality: the rows of a batch come from as many lanes, each from a window of `window_groups` row groups that lay anywhere in the set;
which groups share a window changes each epoch. What stays together is a row group's rows, within a window, and a group's lane. The
`latents` station mixes rows over a part before it cuts row groups. Lanes differ by at most one row group, so over an epoch's end rows of
short lanes come that much more often.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from emu_ray.config import require_at_least
from emu_ray.encoding.buckets import Size, bucket_sizes
from emu_ray.training.order import BatchPlan


@dataclass(frozen=True, kw_only=True)
class OnTheFly:
    """Pictures encoded while training reads them, in place of a `latents` station: nothing to store, and the autoencoder at work in each epoch.

    With an 80 GiB GPU it costs about 1.4 times the compute (counted for an SDXL-shaped U-Net), on GPUs of its own or beside the trainer's.
    """

    size_px: int
    source: Literal["pool", "chosen"] = "pool"
    keep_reasons: tuple[str, ...] | None = ("",)  # of the selection, for source "pool"; None takes every row
    max_aspect: float = 1.0  # as in jobs.encode
    bucket_step_px: int = 64
    batch_size: int = field(default=16, metadata={"affects_result": False})
    actors: int = field(default=1, metadata={"affects_result": False})  # of each trainer
    cpus_each: float = field(default=1, metadata={"affects_result": False})
    gpus_each: float = field(default=0, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "size_px", "bucket_step_px", "batch_size", "actors")
        bucket_sizes(self.size_px, self.max_aspect, self.bucket_step_px)

    @property
    def sizes(self) -> list[Size]:
        """Its buckets."""
        return bucket_sizes(self.size_px, self.max_aspect, self.bucket_step_px)


@dataclass(frozen=True, kw_only=True)
class StreamRecipe:
    """How a set that is larger than memory is read; what is held is `lanes` / workers x `window_groups` row groups a bucket."""

    lanes: int = 64  # best a multiple of the number of workers, and a divisor of the batch size
    window_groups: int = 8  # row groups whose rows are mixed; more shuffle better and need more memory
    encode: OnTheFly | None = None  # None reads a `latents` station
    readers: int = field(default=4, metadata={"affects_result": False})  # windows that a worker reads at once

    def __post_init__(self) -> None:
        require_at_least(self, 1, "lanes", "window_groups", "readers")


@dataclass(frozen=True)
class RowGroup:
    """Rows of one bucket that are read together."""

    file: str  # of the station
    group: int
    rows: int
    chosen: np.ndarray | None = None  # (rows,) int32, which of the group's; None: all


class RowGroups:
    """Row groups of one bucket, kept as columns of numbers: of a billion rows at 1024 px there are tens of millions."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._file, self._group, self._rows = array("i"), array("i"), array("i")
        self._chosen: list[np.ndarray] = []

    def add(self, file: str, group: int, rows: int, chosen: np.ndarray | None = None) -> None:
        """One more; those of a file come one after another, and either all say which rows are `chosen` or none does."""
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        self._file.append(len(self._files) - 1)
        self._group.append(group)
        self._rows.append(rows)
        if chosen is not None:
            self._chosen.append(chosen)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[RowGroup]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> RowGroup:
        return RowGroup(
            self._files[self._file[i]], self._group[i], self._rows[i], self._chosen[i] if self._chosen else None
        )

    @property
    def rows(self) -> np.ndarray:
        """(groups,) int64, the rows of each."""
        return np.array(self._rows, dtype=np.int64)


@dataclass(frozen=True)
class Window:
    """Row groups that are read and mixed together: window number `index` of an epoch of a bucket's lane."""

    bucket: str
    lane: int
    epoch: int
    index: int


@dataclass(frozen=True)
class Piece:
    """Part of a step's share: these rows of a window, in the window's mixed order, are samples `samples` of the batch."""

    window: Window
    places: np.ndarray
    samples: np.ndarray


class StreamOrder:
    """Where each position of each bucket lies."""

    def __init__(self, groups: Mapping[str, RowGroups], plan: BatchPlan, *, lanes: int, window_groups: int) -> None:
        """`groups` by bucket. A bucket of fewer row groups than `lanes` has the largest divisor of `lanes` that they fill."""
        self.plan, self.groups, self.window_groups = plan, groups, window_groups
        self._lanes: dict[str, list[np.ndarray]] = {}  # which of the bucket's row groups
        self._group_rows: dict[str, list[np.ndarray]] = {}  # and how many rows each has
        for number, bucket in enumerate(plan.buckets):
            own = groups[bucket]
            count = max(d for d in range(1, lanes + 1) if lanes % d == 0 and d <= len(own))
            dealt = np.random.default_rng([plan.seed, 23, number]).permutation(len(own))
            self._lanes[bucket] = [dealt[lane::count] for lane in range(count)]
            self._group_rows[bucket] = [own.rows[lane] for lane in self._lanes[bucket]]
        self._rows = {bucket: [int(rows.sum()) for rows in lanes_] for bucket, lanes_ in self._group_rows.items()}
        self._epochs: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def pieces(self, step: int, rank: int, world_size: int) -> list[Piece]:
        """What a worker's share of a step is made of: samples rank, rank + world_size, ... of the batch."""
        reads = self.plan.at(step)
        lanes = len(self._lanes[reads.bucket])
        samples = np.arange(rank, reads.size, world_size)
        positions = reads.in_bucket + samples
        found = []
        for lane in range(lanes):
            here = positions % lanes == lane
            if here.any():
                found += self._in_lane(reads.bucket, lane, positions[here] // lanes, samples[here])
        return found

    def windows(self, first_step: int, last_step: int, rank: int, world_size: int) -> Iterator[Window]:
        """The windows of a worker's shares, each once, in the order in which they are first needed."""
        newest: dict[tuple[str, int], tuple[int, int]] = {}
        for step in range(first_step, last_step):
            for piece in self.pieces(step, rank, world_size):
                window = piece.window
                at = (window.epoch, window.index)
                if newest.get((window.bucket, window.lane), (-1, -1)) < at:
                    newest[window.bucket, window.lane] = at
                    yield window

    def row_groups(self, window: Window) -> list[RowGroup]:
        """What a window reads."""
        order, _ = self._epoch(window.bucket, window.lane, window.epoch)
        start = window.index * self.window_groups
        lane = self._lanes[window.bucket][window.lane]
        return [self.groups[window.bucket][int(i)] for i in lane[order[start : start + self.window_groups]]]

    def mixed(self, window: Window) -> np.ndarray:
        """Row of the window's row groups, laid end to end, at each place of its mixed order."""
        rows = sum(group.rows for group in self.row_groups(window))
        number = self.plan.buckets.index(window.bucket)
        return np.random.default_rng([self.plan.seed, 29, number, window.lane, window.epoch, window.index]).permutation(
            rows
        )

    def _in_lane(self, bucket: str, lane: int, numbers: np.ndarray, samples: np.ndarray) -> list[Piece]:
        """The pieces of ascending row numbers of a lane."""
        found = []
        rows = self._rows[bucket][lane]
        for epoch in np.unique(numbers // rows):
            of_epoch = numbers // rows == epoch
            ends = self._epoch(bucket, lane, int(epoch))[1]
            within = numbers[of_epoch] % rows
            index = np.searchsorted(ends, within, side="right")
            for one in np.unique(index):
                start = ends[one - 1] if one else 0
                chosen = index == one
                window = Window(bucket, lane, int(epoch), int(one))
                found.append(Piece(window, within[chosen] - start, samples[of_epoch][chosen]))
        return found

    def _epoch(self, bucket: str, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a lane's row groups in the epoch's order, and the row at which each window ends; kept while the epoch lasts."""
        key = (bucket, lane, epoch)
        if key not in self._epochs:
            rows, number = self._group_rows[bucket][lane], self.plan.buckets.index(bucket)
            order = np.random.default_rng([self.plan.seed, 31, number, lane, epoch]).permutation(len(rows))
            ends = np.cumsum(rows[order])
            last = (
                np.minimum(np.arange(self.window_groups, len(rows) + self.window_groups, self.window_groups), len(rows))
                - 1
            )
            for old in [k for k in self._epochs if k[:2] == key[:2] and k[2] < epoch - 1]:
                del self._epochs[old]
            self._epochs[key] = (order, ends[last])
        return self._epochs[key]
