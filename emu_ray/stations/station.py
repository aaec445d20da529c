"""One station: begin it, write its parts, finish it; or require it and read it.

A job calls `begin` (False: it is there already), writes, and calls `finish`, which writes the manifest last and
atomically. Large jobs write wave after wave, each a small station in a sub-directory with a manifest of its own: after
a crash only the missing waves are written.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from emu_ray.errors import (
    SchemaError,
    StationConflictError,
    StationError,
    StationHalfWrittenError,
    StationMissingError,
)
from emu_ray.records import SCHEMAS, check_types, conform
from emu_ray.stations.manifest import MANIFEST_FILE, STARTED_FILE, Manifest, Started, difference, identity
from emu_ray.stations.store import Store, said_plainly

WRITTEN_BY = {
    "pool": "ingest|fetch",
    "scores": "score",
    "selection": "select",
    "chosen": "choose",
    "latents": "encode",
    "autoencoder": "train_autoencoder",
    "checkpoints/base": "pretrain",
    "checkpoints/tuned": "quality_tune",
    "samples": "sample",
    "start": "text_encoders",
    "export": "export",
    "heads": "fit_aesthetic",
}
ROW_GROUP_BYTES = 16 << 20
MAX_GROUP_ROWS = 1 << 20
_WAVE = re.compile(r"wave-\d{5}/")


class Station:
    """A directory or `s3://bucket/prefix` with a manifest; building one does no IO, and Ray workers may have it."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.store = Store(uri)
        self._attempt: str | None = None  # known only to the driver that began it

    def __repr__(self) -> str:
        return f"Station({self.uri!r})"

    @property
    def uri(self) -> str:
        """Absolute directory or s3:// address, without a trailing slash."""
        return self.store.uri

    def path(self, name: str = "") -> str:
        """The URI of the file or folder `name` in it."""
        return self.store.path(name)

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """A pyarrow file system and this station's path on it."""
        return self.store.filesystem()

    def wave(self, index: int) -> Station:
        """The station of the wave `index`, counted from 0, inside this one."""
        return Station(self.path(f"wave-{index:05d}"))

    # Reading

    def manifest(self) -> Manifest | None:
        """What it says about itself, or None when it isn't finished."""
        text = self.store.get(MANIFEST_FILE)
        return None if text is None else Manifest.from_json(text, self.path(MANIFEST_FILE))

    def is_finished(self) -> bool:
        """Whether it may be read."""
        return self.manifest() is not None

    def require(self, schema: str | None = None) -> Manifest:
        """The manifest of a finished station that holds `schema`; call it on the driver, before anything dear starts.

        Raises StationMissingError (naming the job that writes it), StationHalfWrittenError, StationError when a file
        was lost or cut since, or SchemaError when the manifest or the columns of the first part say something else
        than `schema`.
        """
        manifest = self.manifest()
        if manifest is None:
            job = self._written_by()
            if self.store.sizes():
                raise StationHalfWrittenError(
                    f"{self.uri} was begun and not finished: run {job} again, it writes what is missing"
                )
            raise StationMissingError(f"{self.uri} doesn't exist: run {job} first")
        if schema is None:
            return manifest
        if manifest.schema != schema:
            raise SchemaError(f"{self.uri}: expected a station of schema {schema!r}, found {manifest.schema!r}")
        self._check_sizes(manifest)
        parts = _parts(manifest)
        if schema in SCHEMAS and parts:
            with said_plainly("read", self.path(parts[0])):
                system, base = self.filesystem()
                columns = pq.read_schema(f"{base}/{parts[0]}", filesystem=system)
            check_types(columns, schema, self.path(parts[0]))
        return manifest

    def parquet_files(self) -> list[str]:
        """URIs of the parts of a finished station, waves included, sorted by name."""
        return [self.path(name) for name in _parts(self.require())]

    def read_table(self, columns: list[str] | None = None) -> pa.Table:
        """All rows of a finished station, parts in the order of their names; `columns` spares reading the others."""
        manifest = self.require()
        system, base = self.filesystem()
        tables: list[pa.Table] = []
        for name in _parts(manifest):
            with said_plainly("read", self.path(name)):
                table = pq.ParquetFile(f"{base}/{name}", filesystem=system).read(columns)
            if columns is None and manifest.schema in SCHEMAS:
                table = conform(table, manifest.schema, self.path(name))
            if missing := [c for c in columns or () if c not in table.column_names]:
                raise SchemaError(
                    f"{self.path(name)}: expected column {missing[0]!r}, found {', '.join(table.column_names)}"
                )
            tables.append(table)
        if not tables:
            empty = SCHEMAS.get(manifest.schema, pa.schema([])).empty_table()
            return empty.select(columns) if columns else empty
        return pa.concat_tables(tables, promote_options="permissive")

    def get_bytes(self, name: str) -> bytes:
        """The bytes of one file, of an unfinished station too (a checkpoint commits itself); StationMissingError."""
        content = self.store.get(name)
        if content is None:
            raise StationMissingError(f"{self.path(name)} doesn't exist")
        return content

    def download(self, name: str, local_dir: str | os.PathLike[str]) -> Path:
        """Copy the file or the folder `name` ("" = all) below `local_dir`, and say where it lies there."""
        files = [n for n in self.store.sizes() if n == name or not name or n.startswith(f"{name}/")]
        if not files:
            raise StationMissingError(f"{self.path(name)} doesn't exist")
        for file in files:
            self.store.download(file, Path(local_dir) / file)
        return Path(local_dir) / name

    # Writing

    def begin(
        self,
        recipe_fingerprint: str,
        recipe_json: str,
        schema: str,
        inputs: dict[str, str],
        keep: tuple[str, ...] = (),
    ) -> bool:
        """Make it ready to be written; False when the same recipe and inputs have finished it: nothing to do.

        Parts of an unfinished attempt are removed, except finished waves, and files below the prefixes `keep` when
        the recipe and the inputs are the same. Raises StationConflictError when another recipe or other inputs
        finished it, or another recipe finished a wave of it (a wave checks its own inputs when it is begun), and
        StationError when the directory holds files of somebody else: nothing is overwritten.
        """
        wanted = identity(schema, recipe_fingerprint, inputs)
        manifest = self.manifest()
        if manifest is not None:
            if manifest.fingerprint == wanted:
                return False
            changed = difference(manifest, schema, recipe_json, inputs)
            raise StationConflictError(
                f"{self.uri} was written by another recipe ({changed}): remove it or choose another --root"
            )
        before = self._started()
        is_same = before is not None and before.identity == wanted
        self._clear(before, recipe_fingerprint, keep if is_same else ())
        self._attempt = uuid.uuid4().hex
        started = Started(
            attempt=self._attempt,
            schema=schema,
            recipe_fingerprint=recipe_fingerprint,
            recipe_json=recipe_json,
            inputs=dict(inputs),
            started_at=time.time(),
        )
        self.store.put(STARTED_FILE, json.dumps(vars(started)).encode())
        return True

    def finish(
        self, rows: int | None = None, counts: dict[str, int] | None = None, extra: dict[str, Any] | None = None
    ) -> Manifest:
        """List the files and write the manifest, last and atomically: of several finishers exactly one wins.

        The rows of a table are counted in the Parquet footers; StationError when `rows` says another number. Raises
        StationConflictError when another run began or finished this station since `begin`, and StationError when a
        wave is unfinished.
        """
        started = self._started()
        if started is None:
            raise StationError(f"{self.uri} can't be finished: it was never begun, or removed since")
        if self._attempt is not None and started.attempt != self._attempt:
            raise StationConflictError(
                f"{self.uri} was begun anew by another run while this one wrote it; this run's work was not committed"
            )
        files, waves = self._listed()
        if started.schema in SCHEMAS:
            stored = self._rows_stored(files, waves)
            if rows is not None and rows != stored:
                raise StationError(
                    f"{self.uri}: expected {rows} rows, found {stored} in its files: "
                    "a part was lost or doubled; run it again"
                )
            rows = stored
        manifest = Manifest(
            station=self.uri,
            schema=started.schema,
            rows=rows,
            files=files,
            counts=dict(counts or {}),
            recipe_fingerprint=started.recipe_fingerprint,
            recipe=json.loads(started.recipe_json),
            inputs=started.inputs,
            seconds=round(time.time() - started.started_at, 3),
            finished_at=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            extra=dict(extra or {}),
        )
        self.store.put_new(MANIFEST_FILE, manifest.to_json().encode())
        return manifest

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one part, e.g. `part-00000.parquet`; it appears whole or not at all.

        Row groups hold about ROW_GROUP_BYTES, so that a reader of a slice reads little else, whatever a row weighs.
        """
        self.write_groups(name, [table])

    def write_groups(self, name: str, tables: list[pa.Table]) -> None:
        """Write one part of tables with the same columns; no row group holds rows of two of them."""
        with self.store.writing(name) as sink, pq.ParquetWriter(sink, tables[0].schema, compression="zstd") as writer:
            for table in tables:
                for start, end in _row_groups(table):
                    writer.write_table(table.slice(start, end - start), row_group_size=max(1, end - start))

    def put_file(self, name: str, content: bytes | Path) -> None:
        """Write one file from bytes or from a local file."""
        self.store.put(name, content)

    def upload_folder(self, local_dir: str | os.PathLike[str], name: str = "") -> None:
        """Copy all files below `local_dir` to the folder `name`."""
        for file in sorted(p for p in Path(local_dir).rglob("*") if p.is_file()):
            relative = file.relative_to(local_dir).as_posix()
            self.store.put(f"{name}/{relative}" if name else relative, file)

    def remove(self) -> None:
        """Take it away, first what says that it may be read; StationError when it holds files of somebody else."""
        names = list(self.store.sizes())
        if names and self._started() is None:
            raise StationError(f"{self.uri} holds files that emu_ray did not write (e.g. {names[0]}): not removed")
        for name in (MANIFEST_FILE, *(n for n in names if n != STARTED_FILE), STARTED_FILE):
            self.store.delete(name)

    # Inside

    def _written_by(self) -> str:
        """The command that writes a station of this name, as far as its place tells."""
        parts = self.uri.split("/")
        job = (
            WRITTEN_BY.get("/".join(parts[-2:]))
            or WRITTEN_BY.get(parts[-1])
            or WRITTEN_BY.get(parts[-2] if parts[1:] else "")
        )
        commands = [f"`python -m jobs.{name}`" for name in job.split("|")] if job else ["the job that writes it"]
        return " or ".join(commands)

    def _check_sizes(self, manifest: Manifest) -> None:
        there = self.store.sizes()
        for name, size in manifest.files.items():
            if there.get(name) != size:
                found = "nothing" if name not in there else f"{there[name]} bytes"
                raise StationError(
                    f"{self.path(name)}: expected {size} bytes, found {found}: the station was changed after it was "
                    f"finished; remove it and run {self._written_by()} again"
                )

    def _started(self) -> Started | None:
        text = self.store.get(STARTED_FILE)
        try:
            return None if text is None else Started(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def _clear(self, before: Started | None, recipe_fingerprint: str, keep: tuple[str, ...]) -> None:
        """Remove an unfinished attempt but what cost hours: its finished waves."""
        names = list(self.store.sizes())
        if names and before is None:
            raise StationError(
                f"{self.uri} holds files that emu_ray did not write (e.g. {names[0]}): "
                "nothing was removed; empty it or choose another --root"
            )
        finished = {n.removesuffix(MANIFEST_FILE) for n in names if _WAVE.match(n) and n.endswith(f"/{MANIFEST_FILE}")}
        if finished and before is not None and before.recipe_fingerprint != recipe_fingerprint:
            raise StationConflictError(
                f"{self.uri} is unfinished and {len(finished)} of its waves were written by another recipe: "
                "finish it with that one, remove it, or choose another --root"
            )
        kept = (*finished, *keep)
        for name in names:
            if name != STARTED_FILE and not name.startswith(kept):
                self.store.delete(name)

    def _listed(self) -> tuple[dict[str, int], list[Manifest]]:
        """Files of this station and its waves with their bytes, and the waves' manifests."""
        files = {n: b for n, b in self.store.sizes().items() if not n.endswith(".partial")}
        waves: list[Manifest] = []
        for wave in sorted({found[0] for n in files if (found := _WAVE.match(n))}):
            manifest = Station(self.path(wave.rstrip("/"))).manifest()
            if manifest is None:
                raise StationError(f"{self.path(wave)} is unfinished: {self.uri} can't be finished; run the job again")
            waves.append(manifest)
        own = (MANIFEST_FILE, STARTED_FILE)
        return {n: b for n, b in files.items() if n.rpartition("/")[2] not in own}, waves

    def _rows_stored(self, files: dict[str, int], waves: list[Manifest]) -> int:
        system, base = self.filesystem()
        rows = sum(wave.rows or 0 for wave in waves)
        for name in files:
            if name.endswith(".parquet") and not _WAVE.match(name):
                with said_plainly("read", self.path(name)):
                    rows += pq.read_metadata(f"{base}/{name}", filesystem=system).num_rows
        return rows


def _parts(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.files if name.endswith(".parquet"))


def _row_groups(table: pa.Table) -> list[tuple[int, int]]:
    """(first, end) rows of groups of at most MAX_GROUP_ROWS and about ROW_GROUP_BYTES, a single heavy row excepted."""
    flat = sum(column.nbytes for column in table.columns if not _weighs_by_row(column.type))
    weight = np.full(len(table), flat / max(1, len(table)))
    for column in table.columns:
        if _weighs_by_row(column.type):
            weight += pc.fill_null(pc.binary_length(column), 0).to_numpy()
    ends = np.cumsum(weight)
    groups, start = [], 0
    while start < len(table):
        before = ends[start - 1] if start else 0.0
        end = int(np.searchsorted(ends, before + ROW_GROUP_BYTES, side="right"))
        end = min(max(end, start + 1), start + MAX_GROUP_ROWS, len(table))
        groups.append((start, end))
        start = end
    return groups or [(0, 0)]


def _weighs_by_row(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string)
    return any(test(kind) for test in tests)
