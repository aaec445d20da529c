"""Exports: by rank, byte for byte, in files of bounded size, and readable again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emu_ray.curation.choosing import ChooseRecipe, choose
from emu_ray.curation.exporting import ExportRecipe, Spool, export, suffix_of
from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.selecting import SelectRecipe, select
from emu_ray.errors import StationConflictError, StationError, StationMissingError
from emu_ray.pictures import decode
from emu_ray.stations import Station

Make = Callable[..., pa.Table]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "PNG")
BY_RANK = [3, -2, 1, 0, 5]  # keys, best first; the key 4 is rejected
KEYS = [0, 1, -2, 3, 4, 5]
BEAUTY = {0: 6.0, 1: 7.0, -2: 8.0, 3: 9.0, 4: 8.5, 5: 5.5}


def write(root: str, name: str, table: pa.Table, rows_per_part: int) -> None:
    station = Station(f"{root}/{name}")
    station.begin("by hand", "{}", name, {})
    for index, start in enumerate(range(0, len(table), rows_per_part)):
        station.write_table(f"part-{index:05d}.parquet", table.slice(start, rows_per_part))
    station.finish(rows=len(table))


def make_root(root: str, make_scores: Make, picture: Callable[..., bytes]) -> str:
    """A pool in another order than its scores, and a selection that rejects one of six."""
    pool = pa.table(
        {
            "key": pa.array(KEYS, pa.int64()),
            "image": pa.array([picture(i, format=f) for i, f in enumerate(FORMATS)], pa.binary()),
            "caption": [f"caption {key}, “quoted”" for key in KEYS],
            "width_px": pa.array([100] * 6, pa.int32()),
            "height_px": pa.array([100] * 6, pa.int32()),
            "likes": pa.array([10, None, 30, 40, 50, 60], pa.int64()),
            "source": [f"https://example.org/{key}" for key in KEYS],
            "fetch_error": [""] * 6,
            "extra": [json.dumps({"license": "CC0", "key": "theirs"}), *[None] * 5],
        }
    )
    scores = [{"key": k, "aesthetic": BEAUTY[k], "offensive": 0.9 if k == 4 else 0.125} for k in sorted(KEYS)]
    write(root, "pool", pool, 4)
    write(root, "scores", make_scores(*scores), 2)
    select(SelectRecipe(root=root, policy=SelectionPolicy(min_short_side_px=64)))
    return root


@pytest.fixture
def root(tmp_path: Path, make_scores: Make, picture: Callable[..., bytes]) -> str:
    return make_root(str(tmp_path), make_scores, picture)


def tar_members(root: str) -> list[list[tuple[str, bytes]]]:
    station = Station(f"{root}/export/webdataset")
    found = []
    for name in sorted(n for n in station.require("export").files if n.endswith(".tar")):
        with tarfile.open(fileobj=io.BytesIO(station.get_bytes(name))) as tar:
            found.append([(m.name, tar.extractfile(m).read()) for m in tar.getmembers()])  # type: ignore[union-attr]
    return found


def test_ids_are_the_kept_keys_best_first(root: str) -> None:
    manifest = export(ExportRecipe(root=root, format="ids"))
    station = Station(f"{root}/export/ids")
    assert station.get_bytes("ids.txt").decode().split() == [str(k) for k in BY_RANK]
    listed = list(csv.DictReader(io.StringIO(station.get_bytes("ids.csv").decode())))
    assert [(int(r["key"]), int(r["rank"])) for r in listed] == list(zip(BY_RANK, range(5), strict=True))
    assert (manifest.rows, manifest.counts["files"]) == (5, 2)


def test_a_tar_has_the_bytes_as_they_were_the_caption_and_the_scores(root: str, picture: Callable[..., bytes]) -> None:
    export(ExportRecipe(root=root))
    (members,) = tar_members(root)
    suffixes = ["gif", "webp", "jpg", "png", "png"]
    pictures = zip(BY_RANK, suffixes, strict=True)
    assert [n for n, _ in members] == [f"{k}.{s}" for k, suffix in pictures for s in (suffix, "json", "txt")]
    files = dict(members)
    assert files["-2.webp"] == picture(2, format="WEBP") and files["0.txt"].decode() == "caption 0, “quoted”"
    fields = json.loads(files["0.json"])
    assert (fields["key"], fields["rank"], fields["likes"], fields["source"]) == (0, 3, 10, "https://example.org/0")
    assert (fields["aesthetic"], fields["offensive"], fields["license"]) == (6.0, 0.125, "CC0")
    assert "embedding" not in fields and "image" not in fields and "caption" not in fields


def test_the_same_export_has_the_same_bytes(root: str) -> None:
    export(ExportRecipe(root=root))
    once = Station(f"{root}/export/webdataset").get_bytes("000000.tar")
    with tarfile.open(fileobj=io.BytesIO(once)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar.getmembers()} == {(0, 0, 0, "")}
    for file in (Path(root) / "export" / "webdataset").iterdir():
        file.unlink()
    export(ExportRecipe(root=root))
    assert Station(f"{root}/export/webdataset").get_bytes("000000.tar") == once


@pytest.mark.parametrize(
    ("limit", "rows"), [({"max_rows_per_file": 2}, [2, 2, 1]), ({"max_bytes_per_file": 1}, [1] * 5)]
)
def test_files_end_at_their_limits_and_hold_at_least_one_row(root: str, limit: dict[str, int], rows: list[int]) -> None:
    manifest = export(ExportRecipe(root=root, **limit))
    members = tar_members(root)
    assert [len(m) // 3 for m in members] == rows and manifest.counts["files"] == len(rows)
    names = [n.split(".")[0] for tar in members for n, _ in tar]
    assert list(dict.fromkeys(names)) == [str(k) for k in BY_RANK]


def test_a_parquet_export_has_pictures_captions_scores_and_their_types(
    root: str, picture: Callable[..., bytes]
) -> None:
    export(ExportRecipe(root=root, format="parquet", max_rows_per_file=3))
    station = Station(f"{root}/export/parquet")
    assert len(station.parquet_files()) == 2
    table = station.read_table()
    assert table.column_names[:4] == ["key", "rank", "image", "caption"]
    assert table["key"].to_pylist() == BY_RANK and table["rank"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["image"].to_pylist()[2] == picture(1, format="JPEG")
    assert table["aesthetic"].to_pylist() == [9.0, 8.0, 7.0, 6.0, 5.5]
    assert table.schema.field("aesthetic").type == pa.float32() and table.schema.field("likes").type == pa.int64()
    assert table["likes"].to_pylist() == [40, 30, None, 10, 60]
    assert not {"embedding", "reject_reason", "duplicate_of"} & set(table.column_names)


def test_embeddings_are_exported_on_request(root: str) -> None:
    export(ExportRecipe(root=root, format="parquet", embeddings=True))
    table = pq.read_table(f"{root}/export/parquet/part-00000.parquet")
    expected = Station(f"{root}/scores").read_table(["key", "embedding"]).to_pylist()
    assert dict(zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True)) == {
        r["key"]: r["embedding"] for r in expected if r["key"] != 4
    }


def test_what_people_chose_is_exported_in_their_order_with_their_captions(root: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("key,caption,annotator\n1,a ball by hand,ann\n3,a star,bob\n")
    choose(ChooseRecipe(root=root, choices=str(tmp_path / "mine.csv")))
    export(ExportRecipe(root=root, source="chosen"))
    files = dict(tar_members(root)[0])
    assert [*files] == ["1.jpg", "1.json", "1.txt", "3.gif", "3.json", "3.txt"]
    assert files["1.txt"] == b"a ball by hand" and json.loads(files["3.json"])["annotator"] == "bob"


def test_a_webdataset_export_is_read_again_by_ingest(root: str, tmp_path: Path, ray_local: None) -> None:
    from emu_ray.ingest.on_ray import IngestRecipe, ingest

    export(ExportRecipe(root=root, max_rows_per_file=2))
    again = str(tmp_path / "again")
    ingest(IngestRecipe(root=again, source=f"{root}/export/webdataset"))
    found = {r["source"]: r for r in Station(f"{again}/pool").read_table().to_pylist()}
    pool = {r["source"]: r for r in Station(f"{root}/pool").read_table().to_pylist() if r["key"] != 4}
    assert found.keys() == pool.keys()
    for source, row in pool.items():
        for column in ("image", "caption", "likes"):
            assert found[source][column] == row[column]


def test_an_export_goes_to_s3_and_comes_back(s3: object, make_scores: Make, picture: Callable[..., bytes]) -> None:
    root = make_root(f"{s3.uri}/exporting", make_scores, picture)  # type: ignore[attr-defined]
    manifest = export(ExportRecipe(root=root))
    assert manifest.station.startswith("s3://") and len(tar_members(root)[0]) == 15


def test_an_export_is_made_once_and_another_is_refused(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = export(ExportRecipe(root=root, format="ids"))
    assert export(ExportRecipe(root=root, format="ids")).finished_at == first.finished_at
    assert "finished before, 5 rows; nothing to do" in capsys.readouterr().out
    with pytest.raises(StationConflictError, match="max_rows_per_file was 10000 and is 7"):
        export(ExportRecipe(root=root, format="ids", max_rows_per_file=7))


def test_exporting_what_does_not_exist_names_the_job(tmp_path: Path) -> None:
    with pytest.raises(StationMissingError, match=r"jobs\.select"):
        export(ExportRecipe(root=str(tmp_path)))


def test_a_wanted_picture_that_the_pool_lacks_is_named(root: str) -> None:
    pool = Station(f"{root}/pool").read_table()
    for file in (Path(root) / "pool").iterdir():
        file.unlink()
    write(root, "pool", pool.slice(1), 4)
    with pytest.raises(StationError, match="1 of 5 wanted pairs are not in .*, e.g. the key 0"):
        export(ExportRecipe(root=root))
    assert not Station(f"{root}/export/webdataset").is_finished()


def encoded(format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("format", decode.FORMATS)
def test_every_format_that_is_decoded_has_a_suffix(format: str) -> None:
    expected = {"JPEG": "jpg", "TIFF": "tif", "HEIF": "heic"}.get(format, format.lower())
    assert suffix_of(encoded(format)) == expected


def test_kinds_of_a_format_share_its_suffix_and_no_bytes_end_an_export() -> None:
    second = Image.new("RGB", (16, 16))
    assert suffix_of(encoded("MPO", save_all=True, append_images=[second])) == "jpg"
    assert suffix_of(encoded("TIFF", big_tiff=True)) == "tif"
    assert suffix_of(b"404") == suffix_of(b"") == "bin"


def test_pictures_beside_the_wanted_ones_are_not_read(root: str) -> None:
    pool = Station(f"{root}/pool").read_table()
    for file in (Path(root) / "pool").iterdir():
        file.unlink()
    write(root, "pool", pool, 1)
    rejected = Path(root) / "pool" / f"part-{KEYS.index(4):05d}.parquet"
    chunk = pq.read_metadata(rejected).row_group(0).column(pool.column_names.index("image"))
    content = bytearray(rejected.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    rejected.write_bytes(content)
    with pytest.raises(OSError):
        pq.read_table(rejected)
    assert export(ExportRecipe(root=root)).rows == 5


def test_a_spool_gives_records_by_place_whatever_the_order_of_writing() -> None:
    with Spool(3) as spool:
        spool.put(2, b"two")
        spool.put(0, b"zero")
        assert (spool.get(2), spool.get(0)) == (b"two", b"zero")
        for place, record in ((0, b""), (2, b"again")):
            assert spool.get(2) == b"two"  # reading moves no record
            spool.put(place, record)
        assert (spool.get(2), spool.get(0)) == (b"again", b"")
        assert spool.is_there.tolist() == [True, False, True]


def test_a_file_of_no_rows_is_refused() -> None:
    with pytest.raises(Exception, match="max_rows_per_file of ExportRecipe must be at least 1"):
        dataclasses.replace(ExportRecipe(root="r"), max_rows_per_file=0)
