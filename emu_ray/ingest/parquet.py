"""Parquet files with the image's bytes or its path in one column and the caption in another."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from emu_ray.errors import InputError, first_line
from emu_ray.ingest.pairs import (
    FILE_MISSING,
    NO_IMAGE,
    Caps,
    Pair,
    caption_text,
    likes_count,
    source_text,
    why_no_bytes,
)
from emu_ray.ingest.parquet_rows import rows_of
from emu_ray.ingest.shards import Shard
from emu_ray.stations import open_filesystem

BATCH_ROWS = 256  # fewer where that many would exceed BATCH_BYTES
BATCH_BYTES = 16 << 20
BAD_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR, errno.ELOOP)  # no file can lie there


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """Names to look for, in this order; the first that a file has is taken."""

    image: tuple[str, ...] = ("image", "jpg", "bytes", "path", "image_path")
    caption: tuple[str, ...] = ("caption", "text", "TEXT")
    likes: tuple[str, ...] = ("likes",)
    source: tuple[str, ...] = ("source",)
    keep_others: bool = True  # in the pool's column `extra`


def read_parquet(shard: Shard, caps: Caps, columns: ParquetColumns | None = None) -> Iterator[Pair]:
    """The pairs of one row group, in order.

    An image column holds bytes, a path (relative to the Parquet file, absolute, or s3://), or a struct of `bytes` and
    `path` as Hugging Face's datasets write it. A path where no file can lie, or none does, and a null give a row with
    an empty image and a reason. Raises InputError naming the file when it, or a file that it names, can't be read, or
    when it has no image column or one of another type.
    """
    columns = columns or ParquetColumns()
    system, path = open_filesystem(shard.uri)
    row = 0
    try:
        file = pq.ParquetFile(path, filesystem=system)
        wanted = _wanted(file.schema_arrow, columns, shard.uri)
        others = [n for n in file.schema_arrow.names if n not in wanted.values()] if columns.keep_others else []
        groups = list(range(file.num_row_groups)) if shard.row_group is None else [shard.row_group]
        for batch in file.iter_batches(
            _batch_rows(file, groups), row_groups=groups, columns=list(dict.fromkeys([*wanted.values(), *others]))
        ):
            for fields in rows_of(batch):
                value = {use: fields[name] for use, name in wanted.items()}
                image, why_none = _image(value["image"], shard.base, caps.max_image_bytes)
                yield Pair(
                    image=image,
                    caption=caption_text(value.get("caption")),
                    address=f"{shard.name}/{groups[0]}/{row}",
                    likes=likes_count(value.get("likes")),
                    source=source_text(value.get("source")),
                    fetch_error=why_none,
                    extra={name: fields[name] for name in others},
                )
                row += 1
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't read {shard.uri} as Parquet: {first_line(error)}") from error


def _batch_rows(file: pq.ParquetFile, groups: list[int]) -> int:
    """How many rows to hold at once: BATCH_ROWS, or about BATCH_BYTES of the heaviest group's."""
    each = (file.metadata.row_group(group) for group in groups)
    row_bytes = max((g.total_byte_size / max(1, g.num_rows) for g in each), default=0)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, row_bytes))))


def _wanted(schema: pa.Schema, columns: ParquetColumns, uri: str) -> dict[str, str]:
    """Use -> column name."""
    wanted: dict[str, str] = {}
    for use in ("image", "caption", "likes", "source"):
        names = getattr(columns, use)
        if present := [name for name in names if name in schema.names]:
            wanted[use] = present[0]
        elif use == "image" and {"url", "URL"} & set(schema.names):
            raise InputError(
                f"{uri} lists URLs and holds no images: fetch them with `python -m jobs.fetch urls --source ...`"
            )
        elif use == "image":
            raise InputError(
                f"{uri}: expected an image column ({', '.join(names)}), found {', '.join(schema.names) or 'none'}: "
                "name yours with --columns.image"
            )
    found = schema.field(wanted["image"]).type
    if not _may_hold_images(found):
        raise InputError(
            f"{uri}: expected the image column {wanted['image']!r} to hold bytes, paths or structs of `bytes` and `path`, "
            f"found {found}: name another with --columns.image"
        )
    return wanted


def _may_hold_images(found: pa.DataType) -> bool:
    if isinstance(found, pa.BaseExtensionType):
        found = found.storage_type
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_struct(found):
        return bool({"bytes", "path"} & {inner.name for inner in found})
    is_one = (
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null),
    )
    return any(each(found) for each in is_one)


def _image(value: object, base: str, max_bytes: int) -> tuple[bytes, str]:
    """The image's bytes, and why there are none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        value = _file(value, base, max_bytes)
        if value is None:
            return b"", FILE_MISSING
    if not isinstance(value, bytes):
        return b"", NO_IMAGE
    image = value if len(value) <= max_bytes else None
    return image or b"", why_no_bytes(image)


def _file(path: str, base: str, max_bytes: int) -> bytes | None:
    """The file's bytes, more than `max_bytes` when it is larger; None when there is none, or none of that name can be.

    Raises InputError for anything else: a network that fails or a missing permission must not become rows for ever.
    """
    uri = path if "://" in path or path.startswith("/") else f"{base}/{path}"
    from_afar = base.startswith("s3://") and not uri.startswith("s3://")  # a bucket's file may not read this machine's
    if from_afar or ("://" in uri and not uri.startswith("s3://")):
        return None
    system, local = open_filesystem(uri)
    try:
        if system.get_file_info(local).type != fs.FileType.File:
            return None
        with system.open_input_stream(local) as stream:
            return bytes(stream.read(max_bytes + 1))
    except ValueError:  # ArrowInvalid, UnicodeEncodeError: a NUL, a lone surrogate, an S3 address without a key
        return None
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) in BAD_NAMES:
            return None
        raise InputError(f"can't read the image {uri}: {first_line(error)}") from error
