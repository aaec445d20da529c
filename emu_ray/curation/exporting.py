"""Hands a selection, or what people chose, to other programs: lists of keys, WebDataset tars, or Parquet files with the pictures.

Pictures keep their bytes. The pool lies in its own order and an export goes by rank, so pictures and texts pass through
files in the temporary directory first: that takes as much disk as the export, and memory for 16 bytes a row and file.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emu_ray.config import fingerprint, require_at_least, to_json
from emu_ray.curation.policy import KEPT
from emu_ray.curation.row_batches import column_names, row_batches
from emu_ray.errors import InputError, StationError
from emu_ray.pictures.decode import open_header
from emu_ray.stations import Manifest, Station
from emu_ray.stations.slices import cut, read_part, read_slice
from emu_ray.stations.station import MAX_GROUP_ROWS

Format = Literal["ids", "webdataset", "parquet"]
ROWS_PER_BATCH = 8192
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "HEIF": "heic"}  # where Pillow's name of a format isn't one
_OWN = ("key", "rank", "image", "caption")  # the columns that every export has


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """What leaves the house, and in which shape: ROOT/selection or ROOT/chosen -> ROOT/export/FORMAT."""

    root: str
    format: Format = "webdataset"
    source: Literal["selection", "chosen"] = "selection"  # chosen: with the captions that people wrote
    max_rows_per_file: int = 10_000
    max_bytes_per_file: int = 1 << 29  # of pictures and texts; a file with one row may be larger
    embeddings: bool = False  # of CLIP too, 3 kB a row as numbers and 8 kB in JSON

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_rows_per_file", "max_bytes_per_file")


@dataclass(frozen=True)
class Wanted:
    """The rows to export, best first."""

    key: np.ndarray  # (N,) int64 in the order of rank
    rank: np.ndarray  # (N,) int64: the place in the whole ranking, which counts what quotas took out
    by_key: np.ndarray  # (N,) places in `key`, sorted by key

    def places(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(len(keys),) bool, which of `keys` are wanted, and the places of those."""
        at = np.searchsorted(self.key, keys, sorter=self.by_key)
        places = self.by_key[np.minimum(at, len(self.key) - 1)]
        is_wanted = self.key[places] == keys
        return is_wanted, places[is_wanted]


class Spool:
    """A temporary file of N records, written in any order and read in theirs; of two records of one place the last counts."""

    def __init__(self, count: int) -> None:
        self.file = tempfile.TemporaryFile(prefix="emu_ray-export-")
        self.start = np.zeros(count, np.int64)
        self.size = np.zeros(count, np.int64)
        self.is_there = np.zeros(count, bool)
        self.end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, place: int, record: bytes) -> None:
        """Append a record."""
        self.file.seek(self.end)
        self.file.write(record)
        self.start[place], self.size[place], self.is_there[place] = self.end, len(record), True
        self.end += len(record)

    def get(self, place: int) -> bytes:
        """The record of a place that was written."""
        self.file.seek(int(self.start[place]))
        return self.file.read(int(self.size[place]))


@dataclass(frozen=True)
class Record:
    """One exported pair."""

    key: int
    rank: int
    image: bytes
    caption: str
    fields: dict[str, Any]  # the pool's other columns and the scores


def export(recipe: ExportRecipe) -> Manifest:
    """Write ROOT/export/FORMAT, by rank, best first; a station of schema "export" with the counts rows, files, bytes.

    ids: `ids.txt`, a key a line, and `ids.csv` with key and rank. webdataset: tars of `KEY.jpg` (or another suffix, by
    the bytes), `KEY.json` (key, rank, likes, source, the pool's other columns, the scores) and `KEY.txt`. parquet: the
    same as columns. Raises InputError when nothing was kept, StationError when the pool lacks a wanted picture.
    """
    base = recipe.root.rstrip("/")
    target = Station(f"{base}/export/{recipe.format}")
    names = {"ids": (recipe.source,)}.get(recipe.format, (recipe.source, "pool", "scores"))
    stations = {name: Station(f"{base}/{name}") for name in names}
    inputs = {name: station.require(name).fingerprint for name, station in stations.items()}
    if not target.begin(fingerprint(recipe), to_json(recipe), "export", inputs):
        manifest = target.require("export")
        print(f"{target.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    wanted = _wanted(stations[recipe.source], recipe.source)
    if recipe.format == "ids":
        _write_ids(target, wanted)
    else:
        _write_pictures(recipe, stations, wanted, target)
    files = {n: b for n, b in target.store.sizes().items() if not n.startswith("_")}
    counts = {"rows": len(wanted.key), "files": len(files), "bytes": sum(files.values())}
    return target.finish(rows=len(wanted.key), counts=counts, extra={"source": recipe.source})


def suffix_of(image: bytes) -> str:
    """jpg, png, webp, gif, tif, avif or heic by the header, "bin" for what is no picture."""
    with contextlib.suppress(Exception), open_header(image) as picture:  # Pillow raises nearly anything
        return SUFFIXES.get(str(picture.format), str(picture.format).lower())
    return "bin"


def _wanted(station: Station, source: str) -> Wanted:
    """The kept rows by rank (of `chosen`: in the order they were taken); InputError when there is none."""
    keys, ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    columns = ["key", "reject_reason", "rank"] if source == "selection" else ["key"]
    for table in row_batches(station, columns):
        if source == "selection":
            table = table.filter(pc.equal(table["reject_reason"], KEPT))
            ranks.append(table["rank"].to_numpy().astype(np.int64))
        keys.append(table["key"].to_numpy())
    key = np.concatenate(keys)
    rank = np.concatenate(ranks) if source == "selection" else np.arange(len(key))
    if not len(key):
        raise InputError(f"{station.uri} keeps nothing: there is nothing to export")
    order = np.lexsort((key, rank))
    return Wanted(key[order], rank[order], np.argsort(key[order], kind="stable"))


def _write_ids(target: Station, wanted: Wanted) -> None:
    with target.store.writing("ids.txt") as plain, target.store.writing("ids.csv") as listed:
        listed.write(b"key,rank\n")
        for start in range(0, len(wanted.key), ROWS_PER_BATCH):
            rows = slice(start, start + ROWS_PER_BATCH)
            both = list(zip(wanted.key[rows].tolist(), wanted.rank[rows].tolist(), strict=True))
            plain.write("".join(f"{key}\n" for key, _ in both).encode())
            listed.write("".join(f"{key},{rank}\n" for key, rank in both).encode())


def _write_pictures(recipe: ExportRecipe, stations: dict[str, Station], wanted: Wanted, target: Station) -> None:
    count = len(wanted.key)
    pool, scores = stations["pool"], stations["scores"]
    score_columns = [c for c in column_names(scores) if recipe.embeddings or c != "embedding"]
    with ExitStack() as stack:
        pictures, texts, measured, captions = (stack.enter_context(Spool(count)) for _ in range(4))
        _spool(pool, column_names(pool), wanted, texts, pictures)
        _spool(scores, score_columns, wanted, measured)
        if recipe.source == "chosen":
            _spool(stations["chosen"], ["key", "caption", "votes", "annotator"], wanted, captions)
        if not pictures.is_there.all():
            missing = wanted.key[~pictures.is_there]
            raise StationError(
                f"{len(missing)} of {count} wanted pairs are not in {pool.uri}, e.g. the key {missing[0]}"
            )

        def records() -> Iterator[Record]:
            for place in range(count):
                fields: dict[str, Any] = {}
                for spool in (measured, texts, captions):  # of two values the owner's counts
                    fields |= json.loads(spool.get(place)) if spool.is_there[place] else {}
                caption = fields.pop("caption")
                yield Record(int(wanted.key[place]), int(wanted.rank[place]), pictures.get(place), caption, fields)

        bytes_of = pictures.size + texts.size + measured.size
        ends = _ends(bytes_of, recipe.max_rows_per_file, recipe.max_bytes_per_file)
        if recipe.format == "webdataset":
            _write_tars(target, records(), ends)
        else:
            schema = _schema([*stations.values()], recipe.embeddings)
            _write_parquet(target, records(), ends, schema)


def _spool(station: Station, columns: list[str], wanted: Wanted, texts: Spool, pictures: Spool | None = None) -> None:
    """Write the wanted rows of a station as JSON to `texts`, and their column `image` to `pictures`."""
    columns = columns if pictures is not None else [c for c in columns if c != "image"]
    for places, table in _wanted_rows(station, columns, wanted):
        for place, row in zip(places.tolist(), table.to_pylist(), strict=True):
            if pictures is not None:
                pictures.put(place, row.pop("image"))
            del row["key"]
            texts.put(place, json.dumps({name: _plain(value) for name, value in row.items()}).encode())


def _wanted_rows(station: Station, columns: list[str], wanted: Wanted) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """(places, rows) a row group; of one that holds no wanted row only the column `key` is read."""
    for uri in station.parquet_files():
        name = uri.removeprefix(f"{station.uri}/")
        keys = read_part(station, name, ["key"])["key"].to_numpy()
        start = 0
        for group in cut(station, [name], rows_per_slice=MAX_GROUP_ROWS):
            is_wanted, places = wanted.places(keys[start : start + group.rows])
            start += group.rows
            if len(places):
                yield places, read_slice(station, group, columns).filter(pa.array(is_wanted))


def _plain(value: Any) -> Any:
    """As JSON can say it: NaN and infinities become null, bytes are left out."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if isinstance(value, bytes) else value


def _ends(bytes_of: np.ndarray, max_rows: int, max_bytes: int) -> list[int]:
    """Where each file ends: as many rows as its limits allow, at least one."""
    total, ends, start = np.cumsum(bytes_of), [], 0
    while start < len(bytes_of):
        before = int(total[start - 1]) if start else 0
        end = min(int(np.searchsorted(total, before + max_bytes, side="right")), start + max_rows, len(bytes_of))
        start = max(end, start + 1)
        ends.append(start)
    return ends


def _write_tars(target: Station, records: Iterator[Record], ends: list[int]) -> None:
    start = 0
    for index, end in enumerate(ends):
        with target.store.writing(f"{index:06d}.tar") as sink:
            with tarfile.open(fileobj=sink, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for _ in range(start, end):
                    record = next(records)
                    fields = {"key": record.key, "rank": record.rank, **record.fields}
                    if isinstance(fields.get("extra"), str):
                        fields |= {**json.loads(fields.pop("extra")), **fields}
                    _add(tar, f"{record.key}.{suffix_of(record.image)}", record.image)
                    _add(tar, f"{record.key}.json", json.dumps(fields, ensure_ascii=False, sort_keys=True).encode())
                    _add(tar, f"{record.key}.txt", record.caption.encode())
        start = end


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time stays 0 and its owner nobody: the same export has the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _schema(stations: list[Station], with_embeddings: bool) -> pa.Schema:
    """The columns of a Parquet export: its own, then the pool's, the scores' and, of chosen pictures, people's."""
    fields = {"key": pa.field("key", pa.int64()), "rank": pa.field("rank", pa.int64())}
    fields |= {"image": pa.field("image", pa.binary()), "caption": pa.field("caption", pa.string())}
    for station in stations:
        for table in row_batches(station, column_names(station), 1):
            fields |= {f.name: f for f in table.schema if f.name not in fields and f.name != "reject_reason"}
            break
    skipped = {"duplicate_of"} | (set() if with_embeddings else {"embedding"})
    return pa.schema([f for name, f in fields.items() if name not in skipped])


def _write_parquet(target: Station, records: Iterator[Record], ends: list[int], schema: pa.Schema) -> None:
    start = 0
    for index, end in enumerate(ends):
        rows = []
        for _ in range(start, end):
            record = next(records)
            own = dict(zip(_OWN, (record.key, record.rank, record.image, record.caption), strict=True))
            rows.append({**record.fields, **own})
        target.write_table(f"part-{index:05d}.parquet", pa.Table.from_pylist(rows, schema=schema))
        start = end
