"""Images in folders, each with its caption in a `.txt` of the same stem.

A `.json` of the same stem may hold `likes`, `source`, and a `caption` for want of a `.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs

from emu_ray.errors import InputError, first_line
from emu_ray.ingest.pairs import (
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


def read_image_folder(shard: Shard, caps: Caps) -> Iterator[Pair]:
    """The pairs of the shard's members, in order; InputError naming a file that vanished or can't be opened."""
    system, path = open_filesystem(shard.base)
    for member in shard.members:
        fields = json_fields(_read(system, path, member.fields, MAX_TEXT_BYTES))
        caption = _read(system, path, member.caption, MAX_TEXT_BYTES)
        image = _read(system, path, member.image, caps.max_image_bytes)
        yield Pair(
            image=image or b"",
            caption=caption_text(fields.get("caption") if caption is None else caption),
            address=member.image,
            likes=likes_count(fields.get("likes")),
            source=source_text(fields.get("source")),
            fetch_error=why_no_bytes(image),
            extra=other_fields(fields),
        )


def _read(system: fs.FileSystem, base: str, name: str | None, max_bytes: int) -> bytes | None:
    """The file's bytes; None without a name, or when it is larger than `max_bytes`."""
    if name is None:
        return None
    try:
        with system.open_input_stream(f"{base}/{name}") as stream:
            content = bytes(stream.read(max_bytes + 1))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't read {base}/{name}: {first_line(error)}") from error
    return content if len(content) <= max_bytes else None
