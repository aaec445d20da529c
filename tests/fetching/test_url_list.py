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
from emu_ray.ingest.pairs import extra_json
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
ON_ONE_LINE = [{**row, "TEXT": " ".join(row["TEXT"].split())} for row in ROWS]  # all that a TSV can say


def rows_for(suffix: str) -> list[dict[str, str]]:
    return ON_ONE_LINE if suffix == "tsv" else ROWS


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=13)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        if path.suffix == ".tsv":
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None, **options}
        with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            writer = csv.DictWriter(file, list(rows[0]), **options)
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
    listed = rows_for(suffix)
    rows = read(write(tmp_path / f"list.{suffix}", listed), urls_per_shard)
    assert [row.url for row in rows] == [each["URL"] for each in listed]
    assert [row.caption for row in rows] == [each["TEXT"].strip() for each in listed]
    assert [row.extra for row in rows] == [{"similarity": f"0.{i}", "width": f"{i}"} for i in range(57)]
    assert [row.address for row in rows] == [f"list.{suffix}/{i}" for i in range(57)]


@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("suffix", "quoting"), [("csv", csv.QUOTE_ALL), ("csv", csv.QUOTE_MINIMAL), ("tsv", csv.QUOTE_NONE)]
)
def test_any_dialect_that_is_usual_is_read(lineterminator: str, quoting: Any, suffix: str, tmp_path: Path) -> None:
    listed, options = rows_for(suffix), {"lineterminator": lineterminator, "quoting": quoting}
    rows = read(write(tmp_path / f"a.{suffix}", listed, encoding="utf-8-sig", **options), 4)
    assert [row.url for row in rows] == [each["URL"] for each in listed]
    assert [row.caption for row in rows] == [each["TEXT"].strip() for each in listed]


def test_a_quote_in_a_tsv_is_a_character_like_any_other(tmp_path: Path) -> None:
    captions = ['"Hello world', "two", '"three" it said', 'four"']
    lines = [f"{caption}\thttp://h.example/{i}" for i, caption in enumerate(captions)]
    (tmp_path / "a.tsv").write_text("\n".join(["caption\turl", *lines]))
    rows = read(tmp_path / "a.tsv")
    assert [row.caption for row in rows] == captions
    assert [row.url for row in rows] == [f"http://h.example/{i}" for i in range(4)]


def test_a_quote_that_is_never_closed_is_named_instead_of_swallowing_the_rows_after_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('url,caption\nhttp://a.example/,"Hello world\n' + "http://b.example/,b\n" * 1000)
    with pytest.raises(InputError, match="a.csv: a quote is never closed in the record that begins with .*a.example"):
        list_urls(str(path))


def test_records_are_cut_where_the_module_csv_cuts_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(300):
        body = "".join(rng.choices('ab",\n', weights=[3, 3, 2, 3, 2], k=60))
        whole = "url,caption\n" + body
        (tmp_path / "a.csv").write_text(whole)
        *expected, last = [row for row in csv.reader(io.StringIO(f"{whole}\nthe,end", newline="\n")) if row][1:]
        if last != ["the", "end"]:  # it is part of a quoted field
            with pytest.raises(InputError, match="a quote is never closed"):
                list_urls(str(tmp_path / "a.csv"))
            continue
        got = read(tmp_path / "a.csv", rng.randrange(1, 6))
        assert [row.url for row in got] == [row[0] for row in expected]
        captions = [row[1].strip() if len(row) > 1 else "" for row in expected]
        assert [row.caption for row in got] == captions


def test_a_value_that_python_can_not_hold_costs_no_row(tmp_path: Path) -> None:
    bytes_of_text = pa.array([b"good", b"caf\xe9", None]).buffers()
    broken = pa.Array.from_buffers(pa.string(), 3, bytes_of_text)
    far = pa.array([0, 10**18, None]).cast(pa.timestamp("us"))
    urls = [f"http://h.example/{i}" for i in range(3)]
    table = pa.table(
        {"url": urls, "caption": broken, "alt": broken, "tags": pa.array([[x] for x in broken]), "at": far}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": broken}), tmp_path / "b.parquet")
    rows = read(tmp_path)
    assert [row.url for row in rows] == [*urls, "good", "caf\udce9", None]
    assert [row.caption for row in rows[:3]] == ["good", "", ""]
    extras = [json.loads(extra_json(row.extra) or "{}") for row in rows[:3]]
    assert [extra.get("alt") for extra in extras] == ["good", "caf?", None]
    assert [extra.get("at") for extra in extras] == ["1970-01-01 00:00:00", f"<value out of range: {10**18}>", None]


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
    assert [row.extra for row in rows] == [
        None,
        {"n": "1", "surplus": ["2", "3"]},
        {"n": "\udcff"},
        {"n": ""},
        None,
        None,
    ]
    assert extra_json(rows[2].extra) == '{"n": "?"}'


def test_json_lines_are_judged_by_the_first_that_parses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('broken\n{"url": "http://a.example/"}\n')
    assert [row.url for row in read(path, 1)] == [None, "http://a.example/"]
    path.write_text('broken\n{"link": "http://a.example/"}\n')
    with pytest.raises(InputError, match="found link"):
        list_urls(str(path))
    path.write_text("broken\n[]\n")
    with pytest.raises(InputError, match="found none"):
        list_urls(str(path), urls_per_shard=1)


def test_a_list_given_by_its_name_is_read_whatever_the_name(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "_u.csv", ROWS))) == 57


def test_a_folder_holds_lists_of_any_kind_and_other_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    (folder / "b").mkdir(parents=True)
    write(folder / "b" / "z.parquet", ROWS[:3])
    write(folder / "a.csv", ROWS[3:5])
    write(folder / ".hidden.csv", ROWS)
    write(folder / "_SUCCESS.csv", ROWS)
    (folder / "README.md").write_text("not a list")
    rows = read(folder)
    assert [row.address.rpartition("/")[0] for row in rows] == ["a.csv"] * 2 + ["b/z.parquet"] * 3


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
