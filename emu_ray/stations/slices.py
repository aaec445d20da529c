"""Rows of a station's Parquet files as small addresses, so that a Ray actor reads its own share.

`ray.data.read_parquet` of Ray 2.60 is not used: it merges small files into one block, so that one actor works while the others wait,
and lists files in a task of one whole CPU, which never starts when the actors hold it (2026-11).
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from emu_ray.errors import SchemaError
from emu_ray.stations.station import Station
from emu_ray.stations.store import said_plainly

CHEAP_TO_REREAD_BYTES = 16 << 20  # a row group is cut only when reading all of it for each slice costs little


@dataclass(frozen=True)
class Slice:
    """Rows of one row group of a Parquet file."""

    path: str  # on the station's file system
    name: str  # of the file in the station
    group: int
    start: int
    rows: int


def cut(station: Station, names: list[str], rows_per_slice: int) -> list[Slice]:
    """The files `names` cut into about `rows_per_slice` rows, in order; a large row group stays whole.

    Row groups are cut by bytes when a station is written, so a slice of heavy rows has fewer of them.
    """
    system, base = station.filesystem()
    slices: list[Slice] = []
    for name in names:
        with said_plainly("read", station.path(name)):
            described = pq.read_metadata(f"{base}/{name}", filesystem=system)
        for group in range(described.num_row_groups):
            rows = described.row_group(group).num_rows
            step = (
                rows_per_slice if described.row_group(group).total_byte_size <= CHEAP_TO_REREAD_BYTES else max(rows, 1)
            )
            slices += [
                Slice(f"{base}/{name}", name, group, start, min(step, rows - start)) for start in range(0, rows, step)
            ]
    return slices


def read_slice(station: Station, wanted: Slice, columns: list[str]) -> pa.Table:
    """The rows of a slice; StationError when the file can't be read, SchemaError when it lacks a column."""
    system, _ = station.filesystem()
    with said_plainly("read", wanted.path):
        group = pq.ParquetFile(wanted.path, filesystem=system).read_row_group(wanted.group, columns=columns)
    if missing := [c for c in columns if c not in group.column_names]:
        raise SchemaError(f"{wanted.path}: expected column {missing[0]!r}, found {', '.join(group.column_names)}")
    return group.slice(wanted.start, wanted.rows)


def read_part(station: Station, name: str, columns: list[str]) -> pa.Table:
    """These columns of one whole part; StationError when the file can't be read."""
    system, base = station.filesystem()
    with said_plainly("read", station.path(name)):
        return pq.ParquetFile(f"{base}/{name}", filesystem=system).read(columns)


def column_names(station: Station, part: str) -> list[str]:
    """The columns of the part at the URI `part`, from its footer."""
    system, base = station.filesystem()
    with said_plainly("read", part):
        return list(pq.read_schema(f"{base}/{part.removeprefix(f'{station.uri}/')}", filesystem=system).names)
