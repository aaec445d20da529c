"""Lists of URLs with captions, as LAION, DataComp and others publish them, cut into shards of some rows.

A Parquet file is cut by row numbers; a text file is read once and cut at the bytes where its records begin, so that a
task reads its own rows and no others. A row is never dropped: what can't be parsed has no URL. A TSV has no quotes (IANA
text/tab-separated-values): a row is a line. A shard inside a row group decodes the group from its beginning: write
groups of some multiple of `urls_per_shard` rows, not one for the whole file.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from emu_ray.errors import InputError, first_line
from emu_ray.ingest.pairs import caption_text, json_fields, likes_count
from emu_ray.ingest.parquet_rows import rows_of
from emu_ray.stations import open_filesystem

Kind = Literal["parquet", "csv", "tsv", "jsonl"]
SUFFIXES: dict[str, Kind] = {
    "parquet": "parquet",
    "pq": "parquet",
    "csv": "csv",
    "tsv": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
}
DIALECTS: dict[str, dict[str, Any]] = {"csv": {}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
_OPENING = re.compile(rb'(?:^|,)"')  # of a quoted field
MAX_RECORD_BYTES = 4 << 20  # a longer record of a text file is a quote that was never closed, or no list
BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class UrlColumns:
    """Names to look for, in this order; the first that a list has is taken, all others travel along."""

    url: tuple[str, ...] = ("url", "URL", "image_url")
    caption: tuple[str, ...] = ("caption", "text", "TEXT")
    likes: tuple[str, ...] = ("likes",)


@dataclass(frozen=True, kw_only=True)
class UrlShard:
    """Some consecutive rows of one list."""

    kind: Kind
    base: str = field(repr=False)  # URI of the folder in which the list lies; where it lies is not what it is
    name: str  # of the list, relative to `base`
    first_row: int
    rows: int
    names: tuple[str, ...]  # of its columns; () in JSON lines, where each row names its own
    size_bytes: int  # of the list; tells a mended file from the broken one
    first_byte: int = 0  # of a text file
    end_byte: int = 0

    @property
    def uri(self) -> str:
        """Where the list lies."""
        return f"{self.base}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class UrlListing:
    """The shards of a source and a fingerprint of the names and sizes of its lists."""

    shards: tuple[UrlShard, ...]
    fingerprint: str


class UrlRow(NamedTuple):
    """A row as listed."""

    url: object  # None, or no text at all, when the row has none
    caption: str
    likes: int | None
    extra: dict[str, object] | None
    address: str  # NAME/ROW, by the row numbers of the list


def list_urls(source: str, columns: UrlColumns | None = None, urls_per_shard: int = 2000) -> UrlListing:
    """All lists in `source` (a file, a folder or s3://) as shards, in the order of their names.

    Raises InputError when there are none, or one can't be read or has no column of URLs.
    """
    columns = columns or UrlColumns()
    base, sizes = _lists(source)
    shards: list[UrlShard] = []
    for name, size_bytes in sizes.items():
        kind = SUFFIXES[name.rpartition(".")[2].lower()]
        whole = UrlShard(kind=kind, base=base, name=name, first_row=0, rows=0, names=(), size_bytes=size_bytes)
        try:
            cut = _cut_parquet if kind == "parquet" else _cut_text
            shards += cut(whole, columns, urls_per_shard)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"can't read the list {whole.uri}: {first_line(error)}") from error
    described = "\n".join(f"{name} {size}" for name, size in sizes.items())
    return UrlListing(shards=tuple(shards), fingerprint=hashlib.sha256(described.encode()).hexdigest()[:16])


def read_rows(shard: UrlShard, columns: UrlColumns | None = None) -> Iterator[UrlRow]:
    """The rows of one shard, in order; InputError when the list can't be read any more."""
    columns = columns or UrlColumns()
    try:
        for row, fields in (_parquet_fields if shard.kind == "parquet" else _text_fields)(shard):
            use = {name: _first(fields, getattr(columns, name)) for name in ("url", "caption", "likes")}
            extra = {name: v for name, v in fields.items() if name not in use.values() and v is not None}
            url = fields.get(use["url"] or "")
            yield UrlRow(
                url=url.decode("utf-8", "surrogateescape") if isinstance(url, bytes) else url,
                caption=caption_text(fields.get(use["caption"] or "")),
                likes=_likes(fields.get(use["likes"] or "")),
                extra=extra or None,
                address=f"{shard.name}/{row}",
            )
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't read the list {shard.uri}: {first_line(error)}") from error


def _lists(source: str) -> tuple[str, dict[str, int]]:
    """The folder's URI, and name -> bytes of the lists in it, sorted."""
    system, path = open_filesystem(source)
    try:
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            base, visible = source.rstrip("/").rpartition("/")[0], {info.base_name: int(info.size or 0)}
        elif info.type == fs.FileType.NotFound:
            raise InputError(f"the list {source} doesn't exist: expected a file, a folder or an s3:// address")
        else:
            inside = system.get_file_info(fs.FileSelector(path, recursive=True))
            files = [i for i in inside if i.type == fs.FileType.File]
            base, found = source.rstrip("/"), {i.path[len(path) :].lstrip("/"): int(i.size or 0) for i in files}
            visible = {n: size for n, size in found.items() if not re.search(r"(^|/)[._]", n)}
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't list {source}: {first_line(error)}") from error
    lists = {n: size for n, size in sorted(visible.items()) if n.rpartition(".")[2].lower() in SUFFIXES}
    if not lists:
        raise InputError(
            f"{source} holds no list of URLs among its {len(visible)} files: expected {', '.join(SUFFIXES)}"
        )
    return base, lists


def _cut_parquet(whole: UrlShard, columns: UrlColumns, urls_per_shard: int) -> Iterator[UrlShard]:
    system, path = open_filesystem(whole.uri)
    file = pq.ParquetFile(path, filesystem=system)
    names = tuple(file.schema_arrow.names)
    _require_url(names, columns, whole.uri)
    rows = file.metadata.num_rows
    for first in range(0, rows, urls_per_shard):
        yield _part(whole, first, min(urls_per_shard, rows - first), names)


def _cut_text(whole: UrlShard, columns: UrlColumns, urls_per_shard: int) -> Iterator[UrlShard]:
    system, path = open_filesystem(whole.uri)
    with system.open_input_file(path) as stream:
        records = _records(io.BufferedReader(stream, 1 << 20), whole.kind, whole.uri)
        names: tuple[str, ...] = ()
        at = 0
        if whole.kind != "jsonl":
            header = next(records, b"")
            names = tuple(_csv_values(header.removeprefix(b"\xef\xbb\xbf"), whole.kind) or ())
            _require_url(names, columns, whole.uri)
            at = len(header)
        is_judged = bool(names)  # JSON lines: the first that parses tells what the file's author had in mind
        rows, row, first_byte = 0, 0, at
        for record in records:
            if not is_judged and (fields := json_fields(record)):
                _require_url(tuple(fields), columns, whole.uri)
                is_judged = True
            at += len(record)
            rows += 1
            if rows == urls_per_shard:
                yield _part(whole, row, rows, names, first_byte, at)
                row, rows, first_byte = row + rows, 0, at
        if not is_judged and row + rows:
            _require_url((), columns, whole.uri)
        if rows:
            yield _part(whole, row, rows, names, first_byte, at)


def _part(
    whole: UrlShard, first_row: int, rows: int, names: tuple[str, ...], first_byte: int = 0, end_byte: int = 0
) -> UrlShard:
    return UrlShard(
        kind=whole.kind,
        base=whole.base,
        name=whole.name,
        first_row=first_row,
        rows=rows,
        names=names,
        size_bytes=whole.size_bytes,
        first_byte=first_byte,
        end_byte=end_byte,
    )


def _require_url(names: tuple[str, ...], columns: UrlColumns, uri: str) -> None:
    if not set(names) & set(columns.url):
        raise InputError(
            f"{uri}: expected a column of URLs ({', '.join(columns.url)}), found {', '.join(names) or 'none'}: "
            "name yours with --columns.url"
        )


def _parquet_fields(shard: UrlShard) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number and fields, from the row groups that hold the shard's rows."""
    system, path = open_filesystem(shard.uri)
    file = pq.ParquetFile(path, filesystem=system)
    end = shard.first_row + shard.rows
    groups: list[int] = []
    row = start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if start < end and stop > shard.first_row:
            row = row if groups else start
            groups.append(group)
        start = stop
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups):
        skipped = max(0, shard.first_row - row)
        wanted = batch.slice(min(skipped, len(batch)), max(0, end - row - skipped))
        for offset, fields in enumerate(rows_of(wanted)):
            yield max(row, shard.first_row) + offset, fields
        row += len(batch)
        if row >= end:
            return


def _text_fields(shard: UrlShard) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number and fields; a record that can't be parsed has no fields."""
    system, path = open_filesystem(shard.uri)
    with system.open_input_file(path) as stream:
        stream.seek(shard.first_byte)
        text = io.BytesIO(stream.read(shard.end_byte - shard.first_byte))
    for row, record in enumerate(_records(text, shard.kind, shard.uri), shard.first_row):
        if shard.kind == "jsonl":
            yield row, json_fields(record)
            continue
        values = _csv_values(record, shard.kind) or []
        fields: dict[str, Any] = dict(zip(shard.names, values, strict=False))
        if len(values) > len(shard.names):
            fields["surplus"] = values[len(shard.names) :]
        yield row, fields


def _records(lines: io.BufferedIOBase, kind: Kind, uri: str) -> Iterator[bytes]:
    """The file's bytes, record by record, each with its line's end; a quoted field of a CSV may hold line ends.

    A blank line is part of the record after it. Quotes are read as the module csv does: one opens a field only at its
    beginning, and a doubled one inside is itself. InputError for one that is never closed: it would swallow rows.
    """
    held = bytearray()
    is_open, is_blank = False, True
    for line in iter(functools.partial(lines.readline, MAX_RECORD_BYTES), b""):
        if kind == "csv" and (is_open or b'"' in line):
            is_open = _is_open_after(line, is_open)
        is_blank = is_blank and not line.strip(b"\r\n")
        if len(held) + len(line) >= MAX_RECORD_BYTES:
            raise InputError(
                f"{uri}: a record of more than {MAX_RECORD_BYTES >> 20} MiB begins with {bytes(held + line)[:80]!r}: "
                "a quote is never closed, or it is no list"
            )
        if is_open or is_blank:
            held += line
            continue
        yield bytes(held) + line if held else line
        held.clear()
        is_blank = True
    if is_open:
        raise InputError(
            f"{uri}: a quote is never closed in the record that begins with {bytes(held)[:80]!r}: close it, or put its "
            "field in quotes and double those inside"
        )
    if not is_blank:
        yield bytes(held)


def _is_open_after(line: bytes, is_open: bool) -> bool:
    """Whether a quoted field reaches beyond `line`, when one did or didn't reach into it."""
    at = 0
    while True:
        if not is_open:
            opens = _OPENING.search(line, at)
            if opens is None:
                return False
            at = opens.end()
        at = line.find(b'"', at)
        if at < 0:
            return True
        is_open = line[at + 1 : at + 2] == b'"'
        at += 2 if is_open else 1


def _csv_values(record: bytes, kind: Kind) -> list[str] | None:
    """The values of one record; None when the module csv can't make sense of it."""
    text = record.decode("utf-8", "surrogateescape").lstrip("\r\n")
    try:
        return next(csv.reader([text], **DIALECTS[kind]), None)
    except csv.Error:  # a lone carriage return, a field of more than 128 KiB
        return None


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in fields), None)


def _likes(value: object) -> int | None:
    return likes_count(int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value) else value)
