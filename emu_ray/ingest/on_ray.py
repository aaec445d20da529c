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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray

from emu_ray.config import absolute, fingerprint, require_at_least, to_json
from emu_ray.error_watch import ErrorWatch, Faults
from emu_ray.errors import InputError
from emu_ray.ingest.image_folder import read_image_folder
from emu_ray.ingest.pairs import FILE_MISSING, Caps, Pair, pool_tables
from emu_ray.ingest.parquet import ParquetColumns, read_parquet
from emu_ray.ingest.shards import Shard, list_shards
from emu_ray.ingest.webdataset import read_webdataset
from emu_ray.records import conform
from emu_ray.stations import Manifest, Station

AnyShard = TypeVar("AnyShard")
SAY_EVERY_S = 10.0
FAULTS = Faults(
    counts=(f"fetch_{FILE_MISSING}",),
    said="name an image file that isn't there",
    look_at="the paths and whether their disk or bucket is mounted",
)


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
    # share of a wave's rows, and of a shard's, whose image file is missing; more ends the run
    max_error_share: float = field(default=0.5, metadata={"affects_result": False})
    # the same, above the share of all waves before
    max_error_jump: float = field(default=0.25, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "images_per_shard", "rows_per_file", "shards_per_wave")


def ingest(recipe: IngestRecipe) -> Manifest:
    """Write ROOT/pool from `recipe.source`, or only the waves that are missing, and return its manifest.

    Nothing runs when the same recipe finished over the same files. Raises InputError for a source without images, a
    broken tar or a Parquet file without an image column, StationError when too many images are missing, and
    StationConflictError when the pool was made by another recipe or from other files.
    """
    source = absolute(recipe.source, "--source")
    listing = list_shards(source, recipe.layout, recipe.images_per_shard)
    caps = Caps(max_image_bytes=recipe.max_image_bytes, max_image_pixels=recipe.max_image_pixels)
    return ingest_tables(
        Station(f"{recipe.root.rstrip('/')}/pool"),
        recipe,
        listing.shards,
        functools.partial(tables_of_shard, caps=caps, columns=recipe.columns),
        {"source": listing.fingerprint},
        WaveSettings(
            shards_per_wave=recipe.shards_per_wave,
            rows_per_file=recipe.rows_per_file,
            watch_after=functools.partial(
                ErrorWatch.before, max_share=recipe.max_error_share, max_jump=recipe.max_error_jump, faults=FAULTS
            ),
        ),
    )


def tables_of_shard(shard: Shard, caps: Caps, columns: ParquetColumns) -> Iterator[pa.Table]:
    """The `pool` tables of one shard of any layout."""
    readers: dict[str, Callable[[Shard, Caps], Iterator[Pair]]] = {
        "image_folder": read_image_folder,
        "webdataset": read_webdataset,
        "parquet": functools.partial(read_parquet, columns=columns),
    }
    return pool_tables(readers[shard.layout](shard, caps), caps)


@dataclass(frozen=True, kw_only=True)
class WaveSettings:
    """How a pool is cut into waves and files, what a task takes, and when a wave has failed."""

    shards_per_wave: int
    rows_per_file: int
    cpus_per_task: float = 1
    watch_after: Callable[[Mapping[str, int]], ErrorWatch] | None = None
    # counts of all waves before -> the watch of the next, which judges each shard and the wave so far


def ingest_tables(
    station: Station,
    recipe: object,
    shards: Sequence[AnyShard],
    tables_of: Callable[[AnyShard], pa.Table | Iterable[pa.Table]],
    inputs: dict[str, str],
    settings: WaveSettings,
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
    step = settings.shards_per_wave
    waves = [range(start, min(start + step, len(shards))) for start in range(0, len(shards), step)]
    counts: Counter[str] = Counter()
    for index, wave in enumerate(waves):
        target, own = station.wave(index), {"shards": fingerprint_of([shards[i] for i in wave])}
        if target.begin(recipe_fingerprint, recipe_json, "pool", own):
            said = f"ingest: wave {index + 1} of {len(waves)}"
            print(f"{said}, {len(wave)} shards", flush=True)
            write = functools.partial(
                _write_shard, station=target, tables_of=tables_of, rows_per_file=settings.rows_per_file
            )
            watch = settings.watch_after(counts) if settings.watch_after else None
            found = _run_wave(write, {i: shards[i] for i in wave}, settings.cpus_per_task, watch, said)
            target.finish(rows=found["rows"], counts=dict(found))
        counts.update(target.require("pool").counts)
    if not counts["rows"]:
        raise InputError(
            f"expected at least one image or URL in the source of {station.uri}, found none: check --source"
        )
    return station.finish(rows=counts["rows"], counts=dict(counts))


def fingerprint_of(shards: Sequence[Any]) -> str:
    """16 hex digits of what these shards are, so that a mended file costs its own wave and no other."""
    return hashlib.sha256("\n".join(map(repr, shards)).encode()).hexdigest()[:16]


def _run_wave(
    write: Callable[[dict[str, Any]], dict[str, int]],
    shards: dict[int, Any],
    cpus_per_task: float,
    watch: ErrorWatch | None,
    said: str,
) -> Counter[str]:
    items = [{"index": index, "shard": [ray.cloudpickle.dumps(shard)]} for index, shard in shards.items()]
    tasks = ray.data.from_items(items, override_num_blocks=len(items))
    counts: Counter[str] = Counter(rows=0)
    said_at = time.monotonic()
    for done, row in enumerate(tasks.map(write, num_cpus=cpus_per_task).iter_rows(), 1):
        counts.update(row)
        if watch is not None:
            watch.check_counts(row, f"{said}, one of its shards")
            watch.check_counts(counts, said)
        if time.monotonic() - said_at > SAY_EVERY_S:
            print(f"ingest: {done} of {len(items)} shards, {counts['rows']} rows", flush=True)
            said_at = time.monotonic()
    return counts


def _write_shard(
    item: dict[str, Any],
    station: Station,
    tables_of: Callable[[Any], pa.Table | Iterable[pa.Table]],
    rows_per_file: int,
) -> dict[str, int]:
    """Write the shard's parts, remove those of an attempt that wrote more, and return what they hold; on a worker."""
    tables = tables_of(ray.cloudpickle.loads(item["shard"][0]))
    counts: Counter[str] = Counter(rows=0, empty_caption=0, unreadable_header=0, empty_image=0)
    prefix, written = f"part-{item['index']:06d}-", set()
    for part, table in enumerate(_cut([tables] if isinstance(tables, pa.Table) else tables, rows_per_file)):
        name = f"{prefix}{part:04d}.parquet"
        written.add(name)
        table = conform(table, "pool", station.path(name))
        station.write_table(name, table)
        counts["rows"] += len(table)
        counts["empty_caption"] += _count(pc.equal(table["caption"], ""))
        counts["unreadable_header"] += table["width_px"].null_count
        counts["empty_image"] += _count(pc.equal(pc.binary_length(table["image"]), 0))
        if "fetch_error" in table.column_names:
            failed = table["fetch_error"].filter(pc.not_equal(table["fetch_error"], "")).value_counts()
            counts.update({f"fetch_{each['values']}": each["counts"] for each in failed.to_pylist()})
    for name in station.store.sizes():
        if name.startswith(prefix) and name not in written:
            station.store.delete(name)
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
