"""Keys, header sizes and captions: a pair is never dropped, and what is wrong with it shows."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable

import pytest

from emu_ray.ingest.pairs import (
    TABLE_BYTES,
    Caps,
    Pair,
    caption_text,
    extra_json,
    header_size,
    json_fields,
    likes_count,
    pair_key,
    pool_tables,
)
from emu_ray.records import conform


def test_keys_are_the_same_on_every_machine_and_day() -> None:
    assert pair_key(b"image", "caption", "a.tar/1") == -346565076035217732
    assert pair_key(b"image", "caption", "a.tar/1", occurrence=1) == 2792057301912051407


def test_keys_tell_image_caption_address_and_occurrence_apart() -> None:
    keys = {
        pair_key(b"ab", "c", "x"),
        pair_key(b"a", "bc", "x"),
        pair_key(b"ab", "", "cx"),
        pair_key(b"ab", "c", "y"),
        pair_key(b"ab", "c", "x", 1),
        pair_key(b"ab", "c", "x", 2),
    }
    assert len(keys) == 6 and all(-(2**63) <= key < 2**63 for key in keys)


def test_the_same_pair_at_the_same_address_gets_another_key_each_time(picture: Callable[..., bytes]) -> None:
    pairs = [Pair(image=picture(), caption="a", address="x")] * 3
    first, again = (next(pool_tables(pairs, Caps()))["key"].to_pylist() for _ in range(2))
    assert len(set(first)) == 3 and first == again


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_read_from_the_header_alone(picture: Callable[..., bytes], format: str) -> None:
    image = picture(3, 300, 200, format)
    assert header_size(image, 10**6) == (300, 200)
    assert header_size(image[: len(image) // 2], 10**6) == (300, 200) or format == "WEBP"


def bomb(width_px: int, height_px: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    "image", [b"", b"not an image", b"\xff\xd8\xff", bomb(60_000, 60_000), bomb(12_000, 12_000), b"GIF89a"]
)
def test_an_unreadable_or_huge_header_has_no_size(image: bytes) -> None:
    assert header_size(image, 128_000_000) == (None, None)


def test_no_damage_to_a_header_raises(picture: Callable[..., bytes]) -> None:
    dice = random.Random(0)
    for format in ("JPEG", "PNG", "WEBP"):
        for _ in range(200):
            image = bytearray(picture(1, 16, 16, format))
            for _ in range(8):
                image[dice.randrange(min(60, len(image)))] = dice.randrange(256)
            width_px, height_px = header_size(bytes(image[: dice.randrange(1, len(image))]), 10**8)
            assert (width_px is None) == (height_px is None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b" a red frog\n", "a red frog"),
        ("ein schöner Tag".encode(), "ein schöner Tag"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"\xff\xfe latin \xe9", ""),
        (b"", ""),
        (None, ""),
        (7, ""),
        ("\ud800", ""),
        ("x" * (1 << 20), "x" * (1 << 20)),
        ("x" * ((1 << 20) + 1), ""),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_caption_that_is_no_utf8_text_or_too_long_is_empty(raw: object, expected: str) -> None:
    assert caption_text(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(3, 3), (0, 0), (4.0, 4), (4.5, None), (-1, None), (True, None), ("3", None), (float("nan"), None)],
)
def test_likes_are_non_negative_whole_numbers_or_null(raw: object, expected: int | None) -> None:
    assert likes_count(raw) == expected


@pytest.mark.parametrize("raw", [None, b"", b"{", b"[1]", b"\xff\xff", b"[" * 100_000])
def test_a_broken_json_has_no_fields(raw: bytes | None) -> None:
    assert json_fields(raw) == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (None, None),
        ({}, None),
        ({"b": b"\xff", "a": "ü"}, {"a": "ü", "b": "ff"}),
        ({"a": float("nan"), "b": [float("inf"), {"c": float("-inf")}, 0.5, "NaN"]}, {"a": None, "b": [None, {"c": None}, 0.5, "NaN"]}),
        ({"\ud800": "caf\udce9"}, {"?": "caf?"}),
        ({"a": "x" * (1 << 20)}, {"dropped_bytes": (1 << 20) + 9}),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_other_columns_are_one_json_object(fields: dict[str, object] | None, expected: object) -> None:
    def no_json(constant: str) -> None:
        raise AssertionError(constant)

    text = extra_json(fields)
    assert (text if text is None else json.loads(text, parse_constant=no_json)) == expected


def test_what_is_nested_too_deep_to_be_written_ends_nothing() -> None:
    inner: list[object] = []
    for _ in range(100_000):
        inner = [inner]
    assert extra_json({"a": inner}) == '{"dropped_bytes": null}'


def test_a_table_counts_captions_and_other_columns_as_bytes_too() -> None:
    long = "x" * (1 << 20)
    pairs = [Pair(image=b"", caption=long, address=str(i), extra={"a": long[:1000]}) for i in range(150)]
    tables = list(pool_tables(pairs, Caps()))
    assert [len(table) for table in tables] == [64, 64, 22]
    assert max(table.nbytes for table in tables) < 1.01 * TABLE_BYTES


def test_tables_conform_and_keep_every_row(picture: Callable[..., bytes]) -> None:
    pairs = [Pair(image=picture(i), caption="", address=str(i), likes=i) for i in range(4099)]
    tables = [conform(table, "pool") for table in pool_tables(pairs, Caps())]
    assert [len(table) for table in tables] == [4096, 3]
    assert tables[1]["source"].to_pylist() == ["4096", "4097", "4098"]
