"""What lies in a source, cut into the shards that tasks read; the order of shards is the order of their names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from emu_ray.errors import InputError, first_line
from emu_ray.ingest.pairs import IMAGE_SUFFIXES
from emu_ray.stations import open_filesystem

Layout = Literal["image_folder", "webdataset", "parquet"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet", ".pq")
_SEVERAL = {"image_folder": "images", "webdataset": "tars", "parquet": "Parquet files"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """An image of a folder and the texts beside it, as names relative to the folder."""

    image: str
    caption: str | None = None
    fields: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one task reads: some images of a folder, one tar, or one row group of a Parquet file."""

    layout: Layout
    base: str = field(repr=False)  # URI of the folder in which `name` lies; where it lies is not what it is
    name: str  # relative, "" for images of a folder
    members: tuple[Member, ...] = ()
    row_group: int | None = None
    size_bytes: int = 0  # of the tar, the Parquet file or the images; tells a mended file from the broken one

    @property
    def uri(self) -> str:
        """Where it lies."""
        return f"{self.base}/{self.name}" if self.name else self.base


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The shards of a source and a fingerprint of the names and sizes of its files."""

    shards: tuple[Shard, ...]
    fingerprint: str


def list_shards(source: str, layout: Literal["auto"] | Layout = "auto", images_per_shard: int = 1000) -> Listing:
    """Everything in `source` (a file, a folder or s3://) as shards.

    Raises InputError when it doesn't exist, holds nothing of the layout, or, for "auto", holds several layouts.
    """
    base, sizes = _files(source)
    by_layout: dict[Layout, list[str]] = defaultdict(list)
    for name in sizes:
        if kind := _layout_of(name):
            by_layout[kind].append(name)
    if layout == "auto":
        layout = _only_layout(source, by_layout)
    names = by_layout[layout]
    if not names:
        raise InputError(f"{source} holds no {_SEVERAL[layout]} among its {len(sizes)} files")
    described = "\n".join(f"{name} {sizes[name]}" for name in sorted(sizes))
    return Listing(
        shards=tuple(_shards_of(base, layout, names, sizes, images_per_shard)),
        fingerprint=hashlib.sha256(f"{layout}\n{described}".encode()).hexdigest()[:16],
    )


def _shards_of(
    base: str, layout: Layout, names: list[str], sizes: dict[str, int], images_per_shard: int
) -> Iterable[Shard]:
    if layout == "webdataset":
        return [Shard(layout=layout, base=base, name=name, size_bytes=sizes[name]) for name in names]
    if layout == "parquet":
        return [
            Shard(layout=layout, base=base, name=name, row_group=i, size_bytes=sizes[name])
            for name in names
            for i in range(row_group_count(f"{base}/{name}"))
        ]
    members = [_member(name, sizes) for name in names]
    chunks = [members[i : i + images_per_shard] for i in range(0, len(members), images_per_shard)]
    return [
        Shard(layout=layout, base=base, name="", members=tuple(c), size_bytes=sum(sizes[m.image] for m in c))
        for c in chunks
    ]


def _files(source: str) -> tuple[str, dict[str, int]]:
    """The folder's URI, and name -> bytes of the visible files in it, sorted."""
    system, path = open_filesystem(source)
    try:
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            return source.rstrip("/").rpartition("/")[0], {info.base_name: int(info.size or 0)}
        if info.type == fs.FileType.NotFound:
            raise InputError(
                f"the source {source} doesn't exist: expected a folder, a .tar, a .parquet or an s3:// address"
            )
        found = system.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't list the source {source}: {first_line(error)}") from error
    files = {i.path[len(path) :].lstrip("/"): int(i.size or 0) for i in found if i.type == fs.FileType.File}
    visible = {n: size for n, size in files.items() if not any(part.startswith(".") for part in n.split("/"))}
    return source.rstrip("/"), dict(sorted(visible.items()))


def _layout_of(name: str) -> Layout | None:
    lower = name.lower()
    if lower.endswith(TAR_SUFFIXES):
        return "webdataset"
    if lower.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "image_folder" if lower.rpartition(".")[2] in IMAGE_SUFFIXES else None


def _only_layout(source: str, by_layout: dict[Layout, list[str]]) -> Layout:
    if not by_layout:
        raise InputError(
            f"{source} holds nothing to ingest: expected images ({', '.join(IMAGE_SUFFIXES)}), WebDataset tars or Parquet files"
        )
    if len(by_layout) > 1:
        found = ", ".join(f"{len(names)} {_SEVERAL[kind]}" for kind, names in sorted(by_layout.items()))
        raise InputError(f"{source} holds several layouts ({found}): choose one with --layout")
    return next(iter(by_layout))


def _member(image: str, all_names: Container[str]) -> Member:
    stem = image.rpartition(".")[0]
    caption, fields = f"{stem}.txt", f"{stem}.json"
    return Member(
        image=image,
        caption=caption if caption in all_names else None,
        fields=fields if fields in all_names else None,
    )


def row_group_count(uri: str) -> int:
    """The number of row groups of a Parquet file; InputError naming it when it can't be read."""
    system, path = open_filesystem(uri)
    try:
        return int(pq.read_metadata(path, filesystem=system).num_row_groups)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't read {uri} as Parquet: {first_line(error)}") from error
