"""WebDataset tars, read as a stream: `KEY.jpg`, or another of IMAGE_SUFFIXES, beside `KEY.txt` and `KEY.json`.

The .json may hold caption, likes and source; its other fields travel along.

Python's tarfile ends quietly at a damaged or cut-off header and so would lose the rest of a shard; here that is an
InputError.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from emu_ray.errors import InputError, first_line
from emu_ray.ingest.pairs import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Caps,
    Pair,
    caption_text,
    json_fields,
    likes_count,
    other_fields,
    source_text,
    why_no_bytes,
)
from emu_ray.ingest.shards import Shard
from emu_ray.stations import open_filesystem


def read_webdataset(shard: Shard, caps: Caps) -> Iterator[Pair]:
    """The pairs of a tar, in its order; groups without an image are no pairs.

    Raises InputError naming the tar when it can't be opened, is damaged or cut short, or when a caption doesn't stand
    beside its image.
    """
    system, path = open_filesystem(shard.uri)
    without_caption: set[str] = set()
    try:
        with system.open_input_stream(path, compression=None) as stream:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar:
                for key, members in _groups(tar, caps):
                    if key in without_caption:
                        raise InputError(
                            f"{shard.uri}: the files of {key!r} do not stand side by side: "
                            "write the tar sorted by name (tar --sort=name)"
                        )
                    pair = _pair(key, members, shard)
                    if pair is not None and not pair.caption and "txt" not in members:
                        without_caption.add(key)
                    if pair is not None:
                        yield pair
    except (tarfile.TarError, EOFError, zlib.error, OSError, pa.ArrowException) as error:
        raise InputError(f"can't read {shard.uri} as a tar: {first_line(error)}") from error


_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class _StrictTarInfo(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _StrictTarInfo:
        info = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        if info.type in _LONG_HEADERS and info.size > MAX_TEXT_BYTES:  # tarfile would hold it in memory, thrice
            raise tarfile.ReadError(
                f"a header of {info.size} bytes: at most {MAX_TEXT_BYTES} are read for names and attributes"
            )
        return info  # type: ignore[return-value]

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictTarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(tar)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the zero block that ends a whole tar
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is damaged or cut short at byte {tar.offset}: {error}") from error  # type: ignore[attr-defined]


def _groups(tar: tarfile.TarFile, caps: Caps) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Key and suffix -> bytes of neighbouring members; a file over its cap has None."""
    key: str | None = None
    members: dict[str, bytes | None] = {}
    for info in tar:
        folder, _, file = info.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        if not info.isfile() or not stem or not suffix:
            continue
        found = f"{folder}/{stem}" if folder else stem
        suffix = suffix.lower()
        if key is not None and (found != key or suffix in members):
            yield key, members
            members = {}
        key = found
        is_image = suffix.rpartition(".")[2] in IMAGE_SUFFIXES
        if is_image or suffix in ("txt", "json"):
            members[suffix] = _content(tar, info, caps.max_image_bytes if is_image else MAX_TEXT_BYTES)
    if key is not None:
        yield key, members


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int) -> bytes | None:
    if info.size > max_bytes:
        return None
    file: Any = tar.extractfile(info)
    content = bytes(file.read())
    if len(content) != info.size:
        raise tarfile.ReadError(f"{info.name} has {len(content)} of its {info.size} bytes")
    return content


def _pair(key: str, members: dict[str, bytes | None], shard: Shard) -> Pair | None:
    images = [s for s in IMAGE_SUFFIXES if s in members] or sorted(s for s in members if s not in ("txt", "json"))
    if not images:
        return None
    image, fields = members[images[0]], json_fields(members.get("json"))
    return Pair(
        image=image or b"",
        caption=caption_text(members.get("txt", fields.get("caption"))),
        address=f"{shard.name}/{key}",
        likes=likes_count(fields.get("likes")),
        source=source_text(fields.get("source")),
        fetch_error=why_no_bytes(image),
        extra=other_fields(fields),
    )
