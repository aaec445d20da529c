"""What the footers of a `latents` station tell: its row groups by bucket, and whether they are what a training needs. No latent is read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from emu_ray.errors import InputError
from emu_ray.records import ORIGIN
from emu_ray.stations import Station
from emu_ray.stations.store import said_plainly
from emu_ray.training.streaming.order import RowGroups

FOOTERS_AT_ONCE = 32


@dataclass
class LatentScan:
    """A station's row groups by bucket, the columns that every part has, and how many numbers latents have."""

    groups: dict[str, RowGroups] = field(default_factory=dict)
    columns: frozenset[str] | None = None  # None before the first part
    latent_lengths: set[float] = field(default_factory=set)
    knows_sizes: bool = True  # every row has the columns of records.ORIGIN

    @property
    def rows(self) -> dict[str, int]:
        """Of each bucket."""
        return {bucket: int(own.rows.sum()) for bucket, own in self.groups.items()}


def scan_latents(station: Station) -> LatentScan:
    """Of a finished station; InputError for a row group that holds several buckets."""
    found = LatentScan()
    for name, footer in _footers(station):
        names = frozenset(footer.schema.to_arrow_schema().names)
        found.columns = names if found.columns is None else found.columns & names
        paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
        bucket, mean = paths.index("bucket"), next(i for i, path in enumerate(paths) if path.startswith("latent_mean."))
        origin = [paths.index(one) for one in ORIGIN if one in paths]
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            if not group.num_rows:
                continue
            statistics = group.column(bucket).statistics
            if statistics is None or statistics.min != statistics.max:
                raise InputError(
                    f"{station.path(name)}: expected row groups of one bucket each, found one of several: encode again"
                )
            found.groups.setdefault(statistics.min, RowGroups()).add(name, number, group.num_rows)
            found.latent_lengths.add(group.column(mean).num_values / group.num_rows)
            found.knows_sizes &= len(origin) == len(ORIGIN) and not any(_nulls(group.column(i)) for i in origin)
    found.knows_sizes &= bool(found.groups)
    return found


def _nulls(column: pq.ColumnChunkMetaData) -> bool:
    return column.statistics is None or not column.statistics.has_null_count or column.statistics.null_count > 0


def _footers(station: Station) -> Iterator[tuple[str, pq.FileMetaData]]:
    system, base = station.filesystem()
    names = [uri.removeprefix(f"{station.uri}/") for uri in station.parquet_files()]

    def read(name: str) -> tuple[str, pq.FileMetaData]:
        with said_plainly("read", station.path(name)):
            return name, pq.read_metadata(f"{base}/{name}", filesystem=system)

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
        yield from threads.map(read, names)
