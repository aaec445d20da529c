"""Rows of a station as a stream of small tables, so that a pool of any size passes through a bounded memory.

`Station.read_table` gives all rows at once; this gives them in the same order, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emu_ray.errors import SchemaError
from emu_ray.stations import Station
from emu_ray.stations.store import said_plainly

ROWS_PER_BATCH = 1 << 17


def column_names(station: Station) -> list[str]:
    """The columns of the first part; [] when it has no parts."""
    system, base = station.filesystem()
    for uri in station.parquet_files()[:1]:
        with said_plainly("read", uri):
            return list(pq.read_schema(f"{base}/{_name(station, uri)}", filesystem=system).names)
    return []


def row_batches(station: Station, columns: list[str], rows_per_batch: int = ROWS_PER_BATCH) -> Iterator[pa.Table]:
    """Tables of at most `rows_per_batch` rows with these columns, parts in the order of their names.

    StationError when a part can't be read, SchemaError when one lacks a column.
    """
    for uri, file in _files(station):
        _check(file, columns, uri)
        with said_plainly("read", uri):
            for batch in file.iter_batches(batch_size=rows_per_batch, columns=columns):
                yield pa.Table.from_batches([batch])


def float_rows(station: Station, column: str, rows: np.ndarray, rows_per_batch: int = 8192) -> Iterator[pa.Array]:
    """The values of a list column at `rows` (sorted, distinct numbers of rows in the order of `row_batches`).

    A row group that holds none of them is not read.
    """
    start = 0
    for uri, file in _files(station):
        _check(file, [column], uri)
        with said_plainly("read", uri):
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if np.searchsorted(rows, start) < np.searchsorted(rows, end):
                    yield from _picked(file, group, column, rows, start, rows_per_batch)
                start = end


@dataclass(frozen=True)
class ValueRange:
    """Smallest and largest value of a column."""

    least: float
    most: float


def value_ranges(station: Station, columns: list[str]) -> dict[str, ValueRange]:
    """Column of numbers -> its range by the Parquet footers; one without statistics, or without values, is left out."""
    found: dict[str, ValueRange] = {}
    for _, file in _files(station):
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            for at in range(described.num_columns):
                name, statistics = described.column(at).path_in_schema, described.column(at).statistics
                if name not in columns or statistics is None or not statistics.has_min_max:
                    continue
                if isinstance(statistics.min, (int, float)) and not isinstance(statistics.min, bool):
                    before = found.get(name, ValueRange(statistics.min, statistics.max))
                    found[name] = ValueRange(min(before.least, statistics.min), max(before.most, statistics.max))
    return found


def _picked(
    file: pq.ParquetFile, group: int, column: str, rows: np.ndarray, start: int, rows_per_batch: int
) -> Iterator[pa.Array]:
    for batch in file.iter_batches(batch_size=rows_per_batch, row_groups=[group], columns=[column]):
        low, high = np.searchsorted(rows, [start, start + len(batch)])
        if low < high:
            yield batch.column(0).take(pa.array(rows[low:high] - start))
        start += len(batch)


def _files(station: Station) -> Iterator[tuple[str, pq.ParquetFile]]:
    system, base = station.filesystem()
    for uri in station.parquet_files():
        with said_plainly("read", uri):
            file = pq.ParquetFile(f"{base}/{_name(station, uri)}", filesystem=system)
        with file:
            yield uri, file


def _check(file: pq.ParquetFile, columns: list[str], uri: str) -> None:
    if missing := [c for c in columns if c not in file.schema_arrow.names]:
        raise SchemaError(f"{uri}: expected column {missing[0]!r}, found {', '.join(file.schema_arrow.names)}")


def _name(station: Station, uri: str) -> str:
    return uri.removeprefix(f"{station.uri}/")
