"""Every row of a list is read once, by exactly one shard, however the file is written."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_ray.errors import InputError
from emu_ray.fetching.url_list import MAX_RECORD_BYTES, UrlColumns, UrlRow, list_urls, read_rows
from emu_ray.stations import Station

CAPTIONS = [
    "plain",
    "",
    "with, comma",
    'a "quoted" word',
    '"all quoted"',
    "two\nlines",
    "two\r\nlines and\ttab",
    '",\n"',
    "ü 猫 🐈",
    "\n\n",
]
ROWS = [
    {"URL": f"http://h.example/{i}.jpg", "TEXT": CAPTIONS[i % len(CAPTIONS)], "similarity": f"0.{i}", "width": f"{i}"}
    for i in range(57)
]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=13)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **options)
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(source: Path | str, urls_per_shard: int = 2000, columns: UrlColumns | None = None) -> list[UrlRow]:
    listing = list_urls(str(source), columns, urls_per_shard)
    shards = [list(read_rows(shard, columns)) for shard in listing.shards]
    assert [len(rows) for rows in shards] == [shard.rows for shard in listing.shards]
    return [row for rows in shards for row in rows]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
@pytest.mark.parametrize("urls_per_shard", [1, 5, 13, 20, 57, 2000])
def test_every_row_is_read_once_and_in_order(suffix: str, urls_per_shard: int, tmp_path: Path) -> None:
    rows = read(write(tmp_path / f"list.{suffix}", ROWS), urls_per_shard)
    assert [row.url for row in rows] == [each["URL"] for each in ROWS]
    assert [row.caption for row in rows] == [each["TEXT"].strip() for each in ROWS]
    assert [row.extra for row in rows] == [{"similarity": f"0.{i}", "width": f"{i}"} for i in range(57)]
    ranges = [(i // urls_per_shard) * urls_per_shard for i in range(57)]
    ends = [min(first + urls_per_shard, 57) for first in ranges]
    assert [row.address for row in rows] == [
        f"list.{suffix}/{a}-{b}/{i}" for i, (a, b) in enumerate(zip(ranges, ends, strict=True))
    ]


@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_any_dialect_that_is_usual_is_read(lineterminator: str, quoting: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{suffix}", ROWS, lineterminator=lineterminator, quoting=quoting, encoding="utf-8-sig")
    rows = read(path, 4)
    assert [row.url for row in rows] == [each["URL"] for each in ROWS]
    assert [row.caption for row in rows] == [each["TEXT"].strip() for each in ROWS]


def test_records_are_cut_where_the_module_csv_cuts_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(300):
        body = "".join(rng.choices('ab",\n', weights=[3, 3, 2, 3, 2], k=60))
        whole = "url,caption\n" + body
        expected = [row for row in csv.reader(io.StringIO(whole, newline="\n")) if row][1:]
        (tmp_path / "a.csv").write_text(whole)
        got = read(tmp_path / "a.csv", rng.randrange(1, 6))
        assert [row.url for row in got] == [row[0] for row in expected]
        captions = [row[1].strip() if len(row) > 1 else "" for row in expected]
        assert [row.caption for row in got] == captions


def test_rows_that_can_not_be_parsed_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"url": "http://a.example/"}\n\n{"url": broken\n[1]\n{"url": 7, "caption": null}'
    )
    assert [row.url for row in read(tmp_path / "a.jsonl")] == ["http://a.example/", None, None, 7]
    long = "x" * 200_000
    (tmp_path / "a.csv").write_bytes(
        b"url,caption,n\nhttp://a.example/\n\n\nhttp://b.example/,b,1,2,3\n\xff\xfe,\xff,\xff\n,,\n%s\nhttp://c\r.example/,a\n"
        % long.encode()
    )
    rows = read(tmp_path / "a.csv", 2)
    assert [row.url for row in rows] == ["http://a.example/", "http://b.example/", "\udcff\udcfe", "", None, None]
    assert [row.caption for row in rows] == ["", "b", "", "", "", ""]
    assert [row.extra for row in rows] == [None, {"n": "1", "surplus": ["2", "3"]}, {"n": "?"}, {"n": ""}, None, None]
    json.dumps([row.extra for row in rows]).encode()


def test_a_folder_holds_lists_of_any_kind_and_other_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    (folder / "b").mkdir(parents=True)
    write(folder / "b" / "z.parquet", ROWS[:3])
    write(folder / "a.csv", ROWS[3:5])
    write(folder / ".hidden.csv", ROWS)
    write(folder / "_SUCCESS.csv", ROWS)
    (folder / "README.md").write_text("not a list")
    rows = read(folder)
    assert [row.address.rpartition("/")[0] for row in rows] == ["a.csv/0-2"] * 2 + ["b/z.parquet/0-3"] * 3


def test_columns_go_by_the_names_that_the_recipe_gives(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"link": "http://a.example/", "url": "other", "alt": " words ", "likes": 7}]
    columns = UrlColumns(url=("link",), caption=("title", "alt"))
    for suffix in ("csv", "parquet", "jsonl"):
        (row,) = read(write(tmp_path / f"a.{suffix}", rows), columns=columns)
        assert row[:4] == ("http://a.example/", "words", 7, {"url": "other"})


def test_where_a_list_lies_is_not_what_it_is(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "a.csv", ROWS)
    one, two = (list_urls(str(tmp_path / place), urls_per_shard=10) for place in ("one", "two"))
    assert one.fingerprint == two.fingerprint and list(map(repr, one.shards)) == list(map(repr, two.shards))
    write(tmp_path / "two" / "a.csv", ROWS[:-1])
    assert list_urls(str(tmp_path / "two")).fingerprint != one.fingerprint


def test_a_list_on_s3_is_read_in_place(s3: Any, tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        path = write(tmp_path / f"list.{suffix}", ROWS)
        Station(f"{s3.uri}/lists").put_file(path.name, path)
        rows = read(f"{s3.uri}/lists/{path.name}", 10)
        assert [row.url for row in rows] == [each["URL"] for each in ROWS]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_a_list_without_a_column_of_urls_says_what_it_has(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{suffix}", [{"link": "http://a.example/", "TEXT": "a"}])
    with pytest.raises(InputError, match=f"a.{suffix}: expected a column of URLs .* found link, TEXT: .*--columns.url"):
        list_urls(str(path))


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere doesn't exist"):
        list_urls(str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="holds no list of URLs among its 1 files"):
        list_urls(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match="can't read the list .*a.parquet"):
        list_urls(str(tmp_path))
    (tmp_path / "b.csv").write_bytes(b'url\n"http://a.example/\n' + b"http://b.example/\n" * (MAX_RECORD_BYTES // 17))
    with pytest.raises(InputError, match="b.csv: a record of more than 4 MiB begins with .*http://a.example"):
        list_urls(str(tmp_path / "b.csv"))
    for name in ("empty.csv", "only-names.csv"):
        (tmp_path / name).write_text("" if name == "empty.csv" else "url,caption\n")
    with pytest.raises(InputError, match="found none"):
        list_urls(str(tmp_path / "empty.csv"))
    assert not list_urls(str(tmp_path / "only-names.csv")).shards


def test_a_list_that_vanished_is_an_input_error(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        path = write(tmp_path / f"a.{suffix}", ROWS)
        (shard,) = list_urls(str(path)).shards
        path.unlink()
        with pytest.raises(InputError, match=f"can't read the list .*a.{suffix}"):
            list(read_rows(dataclasses.replace(shard)))
