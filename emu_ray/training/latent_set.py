"""Training sets of latents: those in memory, by bucket, and what is known of one that is streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emu_ray.training.feed import Batch, Feed
from emu_ray.training.order import BatchPlan


@dataclass(frozen=True)
class LatentSet:
    """Rows of one bucket of a `latents` station: raw means (N, C, h, w) float16, captions, and where known time ids (N, 6) and keys (N,)."""

    means: np.ndarray
    captions: list[str]
    time_ids: np.ndarray | None = None
    keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: np.ndarray) -> LatentSet:
        """The rows at these indices, in their order."""
        ids, keys = (None if column is None else column[rows] for column in (self.time_ids, self.keys))
        return LatentSet(self.means[rows], [self.captions[i] for i in rows], ids, keys)


# Rows of a bucket as a table of the station's columns, and the randomness of each, to a batch.
ToBatch = Callable[[str, pa.Table, list[np.random.Generator]], Batch]


@dataclass(frozen=True)
class StreamedSet:
    """A set that is read as the steps need it."""

    rows: dict[str, int]  # of each bucket
    shapes: dict[str, tuple[int, int, int]]  # (C, h, w) of each bucket's latents
    feed: Callable[[BatchPlan, ToBatch], Feed]  # for this worker


def taken(data: Mapping[str, LatentSet], rows: np.ndarray) -> dict[str, LatentSet]:
    """The rows at these indices, counted over all buckets in the order of their names; buckets of which none is taken are left out."""
    found, start = {}, 0
    for bucket in sorted(data):
        inside = rows[(rows >= start) & (rows < start + len(data[bucket]))] - start
        if len(inside):
            found[bucket] = data[bucket].take(inside)
        start += len(data[bucket])
    return found


def time_ids(table: pa.Table, bucket: str) -> np.ndarray:
    """(N, 6) int32 of rows with the columns of `records.ORIGIN`: original height and width, crop's top and left, the bucket's height and width."""
    width, height, left, top = (
        table[name].to_numpy() for name in ("original_width_px", "original_height_px", "crop_left_px", "crop_top_px")
    )
    target_width, target_height = (int(side_px) for side_px in bucket.split("x"))
    targets = (np.full(len(table), target_height), np.full(len(table), target_width))
    return np.stack([height, width, top, left, *targets], axis=1).astype(np.int32)


def means_of(table: pa.Table, shape: tuple[int, int, int]) -> np.ndarray:
    """The column `latent_mean` as (N, C, h, w) float16."""
    flat = np.asarray(table["latent_mean"].combine_chunks().flatten(), dtype=np.float16)
    return flat.reshape(len(table), *shape)
