"""Writes the `pool` station with Ray Data: one task a shard, wave after wave.

Each task writes its own Parquet parts, named by the shard's number, and returns only their counts: image bytes never
cross the object store, a retried task replaces its parts instead of doubling them, and the pool is the same for any
number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray

from emu_ray.config import absolute, fingerprint, require_at_least, to_json
from emu_ray.errors import InputError
from emu_ray.ingest.image_folder import read_image_folder
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.ingest.parquet import ParquetColumns, read_parquet
from emu_ray.ingest.shards import Shard, list_shards
from emu_ray.ingest.webdataset import read_webdataset
from emu_ray.records import conform
from emu_ray.stations import Manifest, Station

AnyShard = TypeVar("AnyShard")
SAY_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class IngestRecipe:
    """Where the pairs come from and how the pool is cut."""

    root: str  # the pool is written to ROOT/pool
    source: str = field(metadata={"affects_result": False})  # names and sizes of its files count, not where it lies
    layout: Literal["auto", "image_folder", "webdataset", "parquet"] = "auto"
    columns: ParquetColumns = ParquetColumns()
    images_per_shard: int = 1000  # of an image folder; a tar or a row group is always one shard
    rows_per_file: int = 10_000
    shards_per_wave: int = 64
    max_image_bytes: int = 64 << 20  # a larger file becomes a row with an empty image
    max_image_pixels: int = 64_000_000  # a header that claims more becomes a row without width and height

    def __post_init__(self) -> None:
        require_at_least(self, 1, "images_per_shard", "rows_per_file", "shards_per_wave")


def ingest(recipe: IngestRecipe) -> Manifest:
    """Write ROOT/pool from `recipe.source`, or only the waves that are missing, and return its manifest.

    Nothing runs when the same recipe finished over the same files. Raises InputError for a source without images, a
    broken tar or a Parquet file without an image column, and StationConflictError when the pool was made by another
    recipe or from other files.
    """
    source = absolute(recipe.source, "--source")
    listing = list_shards(source, recipe.layout, recipe.images_per_shard)
    caps = Caps(max_image_bytes=recipe.max_image_bytes, max_image_pixels=recipe.max_image_pixels)
    return ingest_tables(
        Station(f"{recipe.root.rstrip('/')}/pool"),
        recipe,
        listing.shards,
        functools.partial(tables_of_shard, caps=caps, columns=recipe.columns),
        inputs={"source": listing.fingerprint},
        shards_per_wave=recipe.shards_per_wave,
        rows_per_file=recipe.rows_per_file,
    )


def tables_of_shard(shard: Shard, caps: Caps, columns: ParquetColumns) -> Iterator[pa.Table]:
    """The `pool` tables of one shard of any layout."""
    readers: dict[str, Callable[[Shard, Caps], Iterator[Pair]]] = {
        "image_folder": read_image_folder,
        "webdataset": read_webdataset,
        "parquet": functools.partial(read_parquet, columns=columns),
    }
    return pool_tables(readers[shard.layout](shard, caps), caps)


def ingest_tables(
    station: Station,
    recipe: object,
    shards: Sequence[AnyShard],
    tables_of: Callable[[AnyShard], pa.Table | Iterable[pa.Table]],
    *,
    inputs: dict[str, str],
    shards_per_wave: int,
    rows_per_file: int,
) -> Manifest:
    """Write a `pool` station from shards of any kind; the door for pools that are generated instead of read.

    `tables_of` runs as a Ray task per shard and must be importable and depend on its shard alone; its tables are of
    the `pool` schema and may have more columns. Shards must pickle. The manifest's counts: rows, empty_caption,
    unreadable_header, empty_image, and fetch_REASON for each reason in the column `fetch_error`.
    """
    recipe_fingerprint, recipe_json = fingerprint(recipe), to_json(recipe)
    if not station.begin(recipe_fingerprint, recipe_json, "pool", inputs):
        manifest = station.require("pool")
        print(f"{station.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    waves = [
        range(start, min(start + shards_per_wave, len(shards))) for start in range(0, len(shards), shards_per_wave)
    ]
    counts: Counter[str] = Counter()
    for index, wave in enumerate(waves):
        target, own = station.wave(index), {"shards": fingerprint_of([shards[i] for i in wave])}
        if target.begin(recipe_fingerprint, recipe_json, "pool", own):
            print(f"ingest: wave {index + 1} of {len(waves)}, {len(wave)} shards", flush=True)
            found = _run_wave(target, {i: shards[i] for i in wave}, tables_of, rows_per_file)
            target.finish(rows=found["rows"], counts=dict(found))
        counts.update(target.require("pool").counts)
    if not counts["rows"]:
        raise InputError(f"the source of {station.uri} holds no image: nothing was ingested")
    return station.finish(rows=counts["rows"], counts=dict(counts))


def fingerprint_of(shards: Sequence[Any]) -> str:
    """16 hex digits of what these shards are, so that a mended file costs its own wave and no other."""
    return hashlib.sha256("\n".join(map(repr, shards)).encode()).hexdigest()[:16]


def _run_wave(
    target: Station, shards: dict[int, Any], tables_of: Callable[[Any], Any], rows_per_file: int
) -> Counter[str]:
    write = functools.partial(_write_shard, station=target, tables_of=tables_of, rows_per_file=rows_per_file)
    items = [{"index": index, "shard": [ray.cloudpickle.dumps(shard)]} for index, shard in shards.items()]
    tasks = ray.data.from_items(items, override_num_blocks=len(items))
    counts: Counter[str] = Counter(rows=0)
    said = time.monotonic()
    for done, row in enumerate(tasks.map(write).iter_rows(), 1):
        counts.update(row)
        if time.monotonic() - said > SAY_EVERY_S:
            print(f"ingest: {done} of {len(items)} shards, {counts['rows']} rows", flush=True)
            said = time.monotonic()
    return counts


def _write_shard(
    item: dict[str, Any],
    station: Station,
    tables_of: Callable[[Any], pa.Table | Iterable[pa.Table]],
    rows_per_file: int,
) -> dict[str, int]:
    """Write the shard's parts and return what they hold; runs on a worker."""
    tables = tables_of(ray.cloudpickle.loads(item["shard"][0]))
    counts: Counter[str] = Counter(rows=0, empty_caption=0, unreadable_header=0, empty_image=0)
    for part, table in enumerate(_cut([tables] if isinstance(tables, pa.Table) else tables, rows_per_file)):
        name = f"part-{item['index']:06d}-{part:04d}.parquet"
        table = conform(table, "pool", station.path(name))
        station.write_table(name, table)
        counts["rows"] += len(table)
        counts["empty_caption"] += _count(pc.equal(table["caption"], ""))
        counts["unreadable_header"] += table["width_px"].null_count
        counts["empty_image"] += _count(pc.equal(pc.binary_length(table["image"]), 0))
        if "fetch_error" in table.column_names:
            failed = table["fetch_error"].filter(pc.not_equal(table["fetch_error"], "")).value_counts()
            counts.update({f"fetch_{each['values']}": each["counts"] for each in failed.to_pylist()})
    return dict(counts)


def _count(claims: pa.ChunkedArray) -> int:
    return int(pc.sum(claims).as_py() or 0)


def _cut(tables: Iterable[pa.Table], rows_per_file: int, bytes_per_file: int = 512 << 20) -> Iterator[pa.Table]:
    """The same rows as tables of `rows_per_file`, fewer when they would exceed `bytes_per_file`."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        while rows + len(table) >= rows_per_file:
            taken = rows_per_file - rows
            yield pa.concat_tables([*held, table.slice(0, taken)])
            table, held, rows = table.slice(taken), [], 0
        if len(table):
            held.append(table)
            rows += len(table)
        if sum(t.nbytes for t in held) >= bytes_per_file:
            yield pa.concat_tables(held)
            held, rows = [], 0
    if held:
        yield pa.concat_tables(held)
