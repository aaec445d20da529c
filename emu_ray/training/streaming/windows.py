"""Windows of rows put together to a worker's shares of the steps. No Ray here: the rows come from an iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from emu_ray.training.feed import Share
from emu_ray.training.latent_set import ToBatch
from emu_ray.training.order import sample_rng
from emu_ray.training.streaming.order import StreamOrder, Window


class WindowedFeed:
    """A training set of which a worker holds the windows it reads from; see `order.py`."""

    def __init__(
        self,
        order: StreamOrder,
        read: Callable[[Iterator[Window]], Iterator[pa.Table]],
        to_batch: ToBatch,
        rank: int,
        world_size: int,
    ) -> None:
        """`read` gives the rows of these windows in their order, mixed, in tables of any length."""
        self.order, self.plan = order, order.plan
        self.read, self.to_batch = read, to_batch
        self.rank, self.world_size = rank, world_size

    def shares(self, first_step: int, last_step: int) -> Iterator[Share]:
        """Reads on as the steps need it."""
        wanted = self.order.windows(first_step, last_step, self.rank, self.world_size)
        coming = _Rows(self.read(self.order.windows(first_step, last_step, self.rank, self.world_size)))
        held: dict[Window, pa.Table] = {}
        for step in range(first_step, last_step):
            reads = self.plan.at(step)
            tables, samples = [], []
            for piece in self.order.pieces(step, self.rank, self.world_size):
                while piece.window not in held:
                    window = next(wanted)
                    held[window] = coming.take(sum(group.rows for group in self.order.row_groups(window)))
                tables.append(held[piece.window].take(piece.places))
                samples.append(piece.samples)
                _let_go(held, piece.window)
            table, sample = pa.concat_tables(tables), np.concatenate(samples)
            rngs = [sample_rng(self.plan.seed, reads.images_seen + int(i)) for i in sample]
            yield Share(self.to_batch(reads.bucket, table, rngs), [f"key {key}" for key in table["key"].to_pylist()])


def _let_go(held: dict[Window, pa.Table], newest: Window) -> None:
    """Forgets the windows of a lane that come before one that is read now."""
    at = (newest.epoch, newest.index)
    for window in [w for w in held if (w.bucket, w.lane) == (newest.bucket, newest.lane) and (w.epoch, w.index) < at]:
        del held[window]


class _Rows:
    """Tables of any length as tables of the length that is asked for."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._left: pa.Table | None = None

    def take(self, rows: int) -> pa.Table:
        parts = []
        while rows:
            if self._left is None or self._left.num_rows == 0:
                self._left = next(self._tables)
            part = self._left.slice(0, rows)
            self._left = self._left.slice(part.num_rows)
            parts.append(part)
            rows -= part.num_rows
        return pa.concat_tables(parts).combine_chunks()
