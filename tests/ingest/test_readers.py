"""The three layouts, whole and broken, down to the rows."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_ray.errors import InputError
from emu_ray.ingest.image_folder import read_image_folder
from emu_ray.ingest.pairs import Caps, Pair, extra_json
from emu_ray.ingest.parquet import ParquetColumns, read_parquet
from emu_ray.ingest.parquet_rows import rows_of
from emu_ray.ingest.shards import list_shards
from emu_ray.ingest.webdataset import read_webdataset

Picture = Callable[..., bytes]


def pairs_of(source: Path | str, caps: Caps | None = None) -> list[Pair]:
    readers = {"image_folder": read_image_folder, "webdataset": read_webdataset, "parquet": read_parquet}
    found: list[Pair] = []
    for shard in list_shards(str(source)).shards:
        found.extend(readers[shard.layout](shard, caps or Caps()))
    return found


def tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


# Images in folders


def test_a_folder_gives_images_with_captions_likes_and_sources(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.PNG", "sub/b.jpeg", "c.webp", "d.jpg"):
        (tmp_path / name).write_bytes(picture(len(name)))
    (tmp_path / "a.txt").write_text("a frog")
    (tmp_path / "sub/b.json").write_text('{"caption": "a bird", "likes": 7, "source": "album"}')
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(picture())
    found = {p.address: (p.caption, p.likes, p.source) for p in pairs_of(tmp_path)}
    assert found == {
        "a.PNG": ("a frog", None, None),
        "c.webp": ("", None, None),
        "d.jpg": ("", None, None),
        "sub/b.jpeg": ("a bird", 7, "album"),
    }


def test_a_file_over_the_cap_stays_as_a_row_without_bytes(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(b"0" * 1000)
    found = pairs_of(tmp_path, Caps(max_image_bytes=500))
    assert [(len(p.image), p.fetch_error) for p in found] == [(len(picture()), ""), (0, "too_large")]


def test_an_empty_file_stays_as_a_row_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert [(p.image, p.fetch_error) for p in pairs_of(tmp_path)] == [(b"", "no_image")]


def test_an_image_that_vanishes_is_named(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    shard = list_shards(str(tmp_path)).shards[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="a.png"):
        list(read_image_folder(shard, Caps()))


def test_a_folder_is_cut_into_shards_in_the_order_of_names(tmp_path: Path, picture: Picture) -> None:
    for i in reversed(range(5)):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    shards = list_shards(str(tmp_path), images_per_shard=2).shards
    assert [[m.image for m in s.members] for s in shards] == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]


def test_the_listing_changes_with_its_files_and_not_with_its_place(tmp_path: Path, picture: Picture) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(picture())
    one, two = (list_shards(str(tmp_path / folder)).fingerprint for folder in ("one", "two"))
    (tmp_path / "two" / "a.txt").write_text("a caption")
    assert one == two != list_shards(str(tmp_path / "two")).fingerprint


# WebDataset


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_gives_its_pairs_in_order(tmp_path: Path, picture: Picture, name: str) -> None:
    members = [
        ("x/2.jpg", picture(2, format="JPEG")),
        ("x/2.txt", b"two"),
        ("x/2.json", json.dumps({"likes": 3, "source": "here", "caption": "not this"}).encode()),
        ("x/1.json", b'{"caption": "one"}'),
        ("x/1.webp", picture(1, format="WEBP")),
        ("x/0.cls", b"7"),
        ("x/3.png", b"broken"),
        ("x/3.txt", b"\xff\xfe"),
    ]
    found = pairs_of(tar(tmp_path / name, members, "w:gz" if name.endswith("gz") else "w"))
    assert [(p.address, p.caption, p.likes, p.source) for p in found] == [
        (f"{name}/x/2", "two", 3, "here"),
        (f"{name}/x/1", "one", None, None),
        (f"{name}/x/3", "", None, None),
    ]
    assert [p.image for p in found] == [members[0][1], members[4][1], b"broken"]


def test_a_member_over_the_cap_stays_as_a_row_without_bytes(tmp_path: Path, picture: Picture) -> None:
    members = [("1.png", b"0" * 5000), ("1.txt", b"one"), ("2.png", picture()), ("2.txt", b"two"), ("3.png", b"")]
    found = pairs_of(tar(tmp_path / "a.tar", members), Caps(max_image_bytes=1000))
    assert [(len(p.image), p.caption, p.fetch_error) for p in found] == [
        (0, "one", "too_large"),
        (len(picture()), "two", ""),
        (0, "", "no_image"),
    ]


def whole_tar(path: Path, picture: Picture) -> bytes:
    members = [(f"{i}.{s}", c) for i in range(6) for s, c in (("png", picture(i, 64, 64)), ("txt", b"words"))]
    return tar(path, members).read_bytes()


@pytest.mark.parametrize("kept_bytes", [100, 512, 512 * 4, 512 * 6 + 100, 512 * 8])
def test_a_tar_cut_short_anywhere_is_named(tmp_path: Path, picture: Picture, kept_bytes: int) -> None:
    content = whole_tar(tmp_path / "a.tar", picture)
    (tmp_path / "a.tar").write_bytes(content[:kept_bytes])
    with pytest.raises(InputError, match=r"can't read .*a\.tar as a tar"):
        pairs_of(tmp_path)


def test_a_tar_damaged_in_the_middle_is_named_instead_of_ending_quietly(tmp_path: Path, picture: Picture) -> None:
    content = bytearray(whole_tar(tmp_path / "a.tar", picture))
    header = content.index(b"3.png\0")
    content[header + 148 : header + 156] = b"99999999"
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match="damaged or cut short"):
        pairs_of(tmp_path)


def test_a_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=r"a\.tar"):
        pairs_of(tmp_path)


def test_a_tar_with_captions_far_from_their_images_is_refused(tmp_path: Path, picture: Picture) -> None:
    tar(tmp_path / "a.tar", [("1.png", picture(1)), ("2.png", picture(2)), ("1.txt", b"one"), ("2.txt", b"two")])
    with pytest.raises(InputError, match="side by side"):
        pairs_of(tmp_path)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_header_of_many_megabytes_is_refused_before_it_is_read(tmp_path: Path, picture: Picture, name: str) -> None:
    members = [("1.png", picture(1)), ("2.png", picture(2))]

    def write(long: tarfile.TarInfo, format: int) -> None:
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w", format=format) as file:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            file.addfile(long)

    long = tarfile.TarInfo("3.png")
    long.pax_headers = {"comment": "x" * 2_000_000}
    write(long, tarfile.PAX_FORMAT)
    with pytest.raises(InputError, match=rf"can't read .*{name} as a tar: a header of 20\d+ bytes: at most 1048576"):
        pairs_of(tmp_path)
    write(tarfile.TarInfo(f"{'y' * 2_000_000}/3.png"), tarfile.GNU_FORMAT)
    with pytest.raises(InputError, match="a header of 20"):
        pairs_of(tmp_path)
    write(tarfile.TarInfo(f"{'y' * 2_000}/3.png"), tarfile.GNU_FORMAT)
    assert [p.fetch_error for p in pairs_of(tmp_path)] == ["", "", "no_image"]


# Parquet


def test_parquet_takes_bytes_paths_and_structs(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(picture(1))
    pq.write_table(pa.table({"image": [picture(0)], "text": ["zero"], "likes": [4]}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"path": ["in/1.png", "gone.png", None], "TEXT": ["one", "two", None]}), tmp_path / "b.parquet"
    )
    structs = [{"bytes": picture(2), "path": "x"}, {"bytes": None, "path": str(tmp_path / "in/1.png")}]
    pq.write_table(pa.table({"image": structs, "caption": ["three", "four"]}), tmp_path / "c.parquet")
    found = [p for s in list_shards(str(tmp_path), "parquet").shards for p in read_parquet(s, Caps())]
    assert [(p.image, p.caption, p.likes, p.fetch_error) for p in found] == [
        (picture(0), "zero", 4, ""),
        (picture(1), "one", None, ""),
        (b"", "two", None, "file_missing"),
        (b"", "", None, "no_image"),
        (picture(2), "three", None, ""),
        (picture(1), "four", None, ""),
    ]
    assert len({p.address for p in found}) == 6


def test_a_value_that_python_can_not_hold_costs_no_row(tmp_path: Path, picture: Picture) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"caf\xe9", None]).buffers())
    table = {"image": [picture(i) for i in range(3)], "text": broken, "alt": broken, "source": broken}
    far = pa.array([0, 10**18, None]).cast(pa.timestamp("us"))
    pq.write_table(pa.table({**table, "at": far}), tmp_path / "a.parquet")
    found = pairs_of(tmp_path)
    assert [(p.image, p.caption, p.source) for p in found] == [
        (picture(0), "good", "good"),
        (picture(1), "", None),
        (picture(2), "", None),
    ]
    extras = [json.loads(extra_json(p.extra) or "{}") for p in found]
    assert [extra["alt"] for extra in extras] == ["good", "caf?", None]
    assert extras[1]["at"] == f"<value out of range: {10**18}>"


def test_a_struct_keeps_its_bytes_when_its_path_is_no_text(tmp_path: Path, picture: Picture) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"caf\xe9"]).buffers())
    structs = pa.StructArray.from_arrays([pa.array([picture(0), None]), broken], ["bytes", "path"])
    pq.write_table(pa.table({"image": structs}), tmp_path / "a.parquet")
    assert [(p.image, p.fetch_error) for p in pairs_of(tmp_path)] == [(picture(0), ""), (b"", "file_missing")]


def test_a_path_that_no_file_can_have_is_a_missing_file(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(picture(0))
    paths = ["in/0.png", "a\0b.png", "x" * 300, "x/" * 5000 + "a.png", "in/0.png/1.png", "s3://", "in", "http://h/a"]
    pq.write_table(pa.table({"path": paths}), tmp_path / "a.parquet")
    found = [p for s in list_shards(str(tmp_path), "parquet").shards for p in read_parquet(s, Caps())]
    assert [p.fetch_error for p in found] == ["", *["file_missing"] * 7]


@pytest.mark.parametrize("values", [[None, b""], [None, ""], [{"bytes": None, "path": None}, {"bytes": b"", "path": ""}], [None, None]])  # fmt: skip
def test_a_row_without_an_image_says_so(values: list[object], tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    assert [(p.image, p.fetch_error) for p in pairs_of(tmp_path)] == [(b"", "no_image")] * 2


@pytest.mark.parametrize("values", [[1], [[1, 2]], [{"url": "x"}]])
def test_an_image_column_of_another_type_is_named(values: list[object], tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"a\.parquet: expected the image column 'image' to hold bytes, paths or structs"
    ):
        pairs_of(tmp_path)


def test_few_rows_of_heavy_images_are_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def watched(batch: pa.RecordBatch) -> list[dict[str, object]]:
        held.append(len(batch))
        return rows_of(batch)

    monkeypatch.setattr("emu_ray.ingest.parquet.rows_of", watched)
    images = [random.Random(i).randbytes(1 << 20) for i in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    assert [p.image for p in pairs_of(tmp_path)] == images
    assert held == [15, 15, 10]


def test_each_row_group_is_a_shard_with_addresses_of_its_own(tmp_path: Path, picture: Picture) -> None:
    table = pa.table({"jpg": [picture(0)] * 5, "caption": ["same"] * 5})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    listing = list_shards(str(tmp_path / "a.parquet"))
    assert [s.row_group for s in listing.shards] == [0, 1, 2]
    assert len({p.address for s in listing.shards for p in read_parquet(s, Caps())}) == 5


def test_parquet_columns_of_other_names_can_be_named(tmp_path: Path, picture: Picture) -> None:
    pq.write_table(pa.table({"pixels": [picture(0)], "words": ["zero"]}), tmp_path / "a.parquet")
    shard = list_shards(str(tmp_path)).shards[0]
    found = list(read_parquet(shard, Caps(), ParquetColumns(image=("pixels",), caption=("words",))))
    assert [(p.image, p.caption) for p in found] == [(picture(0), "zero")]
    with pytest.raises(InputError, match=r"a\.parquet: expected an image column .* found pixels, words"):
        list(read_parquet(shard, Caps()))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match=r"can't read .*a\.parquet as Parquet"):
        pairs_of(tmp_path)


# The source itself


def test_a_missing_or_empty_source_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="doesn't exist"):
        pairs_of(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds nothing to ingest: expected images \(jpg, .*, avif, "):
        pairs_of(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(InputError, match="holds no images among its 1 files"):
        list_shards(str(tmp_path), "image_folder")


def test_several_layouts_at_once_ask_for_a_choice(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    tar(tmp_path / "b.tar", [("1.png", picture())])
    with pytest.raises(InputError, match="1 images, 1 tars.*--layout"):
        pairs_of(tmp_path)
    assert len(list_shards(str(tmp_path), "webdataset").shards) == 1
