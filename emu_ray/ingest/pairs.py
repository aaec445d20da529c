"""One image-text pair, its key, and the `pool` table of many: what every reader shares.

A pair is never dropped here. What is wrong with it shows in its columns (an empty caption, no width), and scoring and
selection name it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from emu_ray.pictures.decode import open_header
from emu_ray.records import SCHEMAS

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "avif", "heic", "heif")
POOL = pa.schema(
    [
        *SCHEMAS["pool"],
        ("fetch_error", pa.string()),  # "" = there are bytes; else a reason of `fetching`, or one of the three below
        ("extra", pa.string()),  # a JSON object of the source's other columns; null when there are none
    ]
)
TOO_LARGE, FILE_MISSING, NO_IMAGE = "too_large", "file_missing", "no_image"  # why a row read from files has no bytes
MAX_TEXT_BYTES = 1 << 20  # of a caption or a .json beside an image
TABLE_BYTES = 64 << 20  # a reader holds about this much in memory
TABLE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a hostile or mistaken file may cost."""

    max_image_bytes: int = 64 << 20
    max_image_pixels: int = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a reader found; `address` says where in the source, the same on every machine, e.g. `a.tar/000123`."""

    image: bytes
    caption: str
    address: str
    likes: int | None = None
    source: str | None = None  # None: the address
    fetch_error: str = ""  # why there are no bytes
    extra: dict[str, object] | None = None  # the source's other columns


def why_no_bytes(image: bytes | None) -> str:
    """What `fetch_error` says of a file that was read: NO_IMAGE for an empty one, TOO_LARGE for None."""
    return TOO_LARGE if image is None else "" if image else NO_IMAGE


def pair_key(image: bytes, caption: str, address: str, occurrence: int = 0) -> int:
    """A signed 64-bit key: blake2b of image, caption and address, and of the occurrence number when it isn't the first.

    The address keeps exact duplicates in different shards apart: shards are read by different tasks, which can't count
    together. Two of n keys collide with probability n^2 / 2^65: 3e-8 for a million pairs, 3 % for a billion.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (image, caption.encode(), address.encode(), *([str(occurrence).encode()] if occurrence else [])):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def pool_tables(pairs: Iterable[Pair], caps: Caps) -> Iterator[pa.Table]:
    """The pairs of one shard, in order, as `pool` tables of at most TABLE_ROWS rows and about TABLE_BYTES bytes."""
    seen: Counter[int] = Counter()
    columns: dict[str, list[object]] = {name: [] for name in POOL.names}
    held_bytes = 0
    for pair in pairs:
        key = pair_key(pair.image, pair.caption, pair.address)
        seen[key] += 1
        if seen[key] > 1:
            key = pair_key(pair.image, pair.caption, pair.address, occurrence=seen[key] - 1)
        width_px, height_px = header_size(pair.image, caps.max_image_pixels)
        extra = extra_json(pair.extra)
        source = pair.source or pair.address
        row = (key, pair.image, pair.caption, width_px, height_px, pair.likes, source, pair.fetch_error, extra)
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
        held_bytes += len(pair.image) + len(pair.caption) + len(extra or "")
        if held_bytes >= TABLE_BYTES or len(columns["key"]) >= TABLE_ROWS:
            yield pa.table(columns, schema=POOL)
            columns = {name: [] for name in columns}
            held_bytes = 0
    if columns["key"]:
        yield pa.table(columns, schema=POOL)


def header_size(image: bytes, max_pixels: int) -> tuple[int | None, int | None]:
    """Width and height in px as the file's header says (before EXIF rotation), no pixel decoded.

    (None, None) when it is of no known format, when the header is broken, or when it claims more than `max_pixels`.
    """
    if not image:
        return None, None
    try:
        with open_header(image) as header:
            width_px, height_px = header.size
    except Exception:  # a hostile header makes Pillow's plugins raise nearly anything; the row tells it by its nulls
        return None, None
    return (width_px, height_px) if 0 < width_px * height_px <= max_pixels else (None, None)


def extra_json(fields: dict[str, object] | None) -> str | None:
    """The fields as one JSON object; None for none.

    What JSON can't say becomes text, a number that isn't finite null. Of more than MAX_TEXT_BYTES only the size is
    kept, {"dropped_bytes": N}, and of what is nested too deep to be written not even that.
    """
    if not fields:
        return None
    say = functools.partial(json.dumps, ensure_ascii=False, default=_as_text, sort_keys=True)
    try:
        text = say(fields)
        if "NaN" in text or "Infinity" in text:
            text = say(json.loads(text, parse_constant=lambda _: None), allow_nan=False)
    except RecursionError:
        return '{"dropped_bytes": null}'
    raw = text.encode("utf-8", "replace")
    return raw.decode() if len(raw) <= MAX_TEXT_BYTES else json.dumps({"dropped_bytes": len(raw)})


def _as_text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def caption_text(raw: object) -> str:
    """The caption in `raw` (text, or bytes in UTF-8), stripped; "" for none, no UTF-8 and more than MAX_TEXT_BYTES."""
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            return ""
    if not isinstance(raw, str):
        return ""
    try:
        size_bytes = len(raw.encode())
    except UnicodeEncodeError:  # a lone surrogate, e.g. out of a JSON escape
        return ""
    return raw.strip() if size_bytes <= MAX_TEXT_BYTES else ""


def json_fields(raw: bytes | None) -> dict[str, object]:
    """The object in a .json beside an image; {} when there is none or it can't be read."""
    try:
        found = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def other_fields(fields: dict[str, object]) -> dict[str, object]:
    """What a .json beside an image says beyond the pool's own columns."""
    return {name: value for name, value in fields.items() if name not in ("caption", "likes", "source")}


def likes_count(raw: object) -> int | None:
    """A non-negative whole number, or None."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    return int(raw) if 0 <= raw < 2**63 and raw == int(raw) else None


def source_text(raw: object) -> str | None:
    """Where the pair comes from, as its own metadata says, or None."""
    return caption_text(raw) or None
