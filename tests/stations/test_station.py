"""A station is read only when finished, belongs to one recipe and inputs, and is finished by one run."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from emu_ray.errors import (
    SchemaError,
    StationConflictError,
    StationError,
    StationHalfWrittenError,
    StationMissingError,
)
from emu_ray.stations import Manifest, Station

RECIPE = '{"root": "/anywhere", "policy": {"min_side_px": 64}}'


def rows(*keys: int) -> pa.Table:
    return pa.table(
        {
            "key": pa.array(keys, pa.int64()),
            "reject_reason": [""] * len(keys),
            "rank": pa.nulls(len(keys), pa.float32()),
        }
    )


def begin(station: Station, recipe: str = RECIPE, inputs: dict[str, str] | None = None) -> bool:
    return station.begin(str(hash(recipe)), recipe, "selection", {"scores": "aaaa"} if inputs is None else inputs)


def written(uri: str | Path, *keys: int) -> Station:
    station = Station(uri)
    assert begin(station)
    station.write_table("part-00000.parquet", rows(*keys))
    station.finish(counts={"kept": len(keys)})
    return station


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a station, on disk and on S3."""
    if request.param == "disk":
        return str(tmp_path / "runs" / "selection")
    return f"{request.getfixturevalue('s3').uri}/{tmp_path.name}/selection"


def test_a_finished_station_reads_back_what_was_written(place: str) -> None:
    station = written(place, 3, 1, 2)
    manifest = Station(place).require("selection")
    assert (manifest.rows, manifest.counts, manifest.inputs) == (3, {"kept": 3}, {"scores": "aaaa"})
    assert list(manifest.files) == ["part-00000.parquet"] and manifest.files["part-00000.parquet"] > 0
    assert Station(place).read_table()["key"].to_pylist() == [3, 1, 2]
    assert Station(place).read_table(["rank"]).column_names == ["rank"]
    assert station.parquet_files() == [f"{place}/part-00000.parquet"]


def test_an_empty_place_is_missing_and_names_the_job_that_fills_it(place: str) -> None:
    with pytest.raises(StationMissingError, match=r"selection doesn't exist: run `python -m jobs.select` first"):
        Station(place).require()


def test_a_half_written_station_is_never_read(place: str) -> None:
    station = Station(place)
    begin(station)
    station.write_table("part-00000.parquet", rows(1))
    for read in (station.require, station.read_table, station.parquet_files):
        with pytest.raises(StationHalfWrittenError, match="begun and not finished"):
            read()
    assert not station.is_finished()


def test_the_same_recipe_and_inputs_have_nothing_to_do(place: str) -> None:
    written(place, 1)
    assert not begin(Station(place))


@pytest.mark.parametrize(
    ("recipe", "inputs", "said"),
    [
        (RECIPE.replace("64", "65"), {"scores": "aaaa"}, "policy.min_side_px was 64 and is 65"),
        (RECIPE, {"scores": "bbbb"}, "input 'scores' was aaaa and is bbbb"),
    ],
)
def test_another_recipe_or_input_is_a_conflict_that_says_what_differs(
    tmp_path: Path, recipe: str, inputs: dict[str, str], said: str
) -> None:
    written(tmp_path / "selection", 1)
    with pytest.raises(StationConflictError, match=said):
        begin(Station(tmp_path / "selection"), recipe, inputs)
    assert Station(tmp_path / "selection").read_table()["key"].to_pylist() == [1]


def test_the_root_is_no_difference(tmp_path: Path) -> None:
    station = Station(tmp_path / "selection")
    station.begin("ffff", RECIPE, "selection", {})
    station.finish()
    assert not station.begin("ffff", RECIPE.replace("anywhere", "elsewhere"), "selection", {})


def test_of_two_finishers_at_the_same_moment_exactly_one_wins(place: str) -> None:
    station = Station(place)
    begin(station)
    station.write_table("part-00000.parquet", rows(1, 2))
    start = threading.Barrier(4)
    ends: list[str] = []

    def finish() -> None:
        start.wait()
        try:
            ends.append(type(station.finish()).__name__)
        except StationConflictError as error:
            ends.append(type(error).__name__)

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["Manifest"] + ["StationConflictError"] * 3
    assert station.require().rows == 2


def test_a_run_whose_station_was_begun_anew_does_not_commit(place: str) -> None:
    slow, quick = Station(place), Station(place)
    begin(slow)
    slow.write_table("part-00000.parquet", rows(1))
    begin(quick)
    quick.write_table("part-00000.parquet", rows(7))
    with pytest.raises(StationConflictError, match="begun anew"):
        slow.finish()
    quick.finish()
    assert quick.read_table()["key"].to_pylist() == [7]


def test_finished_waves_survive_a_crash_and_unfinished_ones_are_cleared(place: str) -> None:
    station = Station(place)
    begin(station)
    station.write_table("stray.parquet", rows(99))
    assert begin(station.wave(0))
    station.wave(0).write_table("part.parquet", rows(1, 2))
    station.wave(0).finish()
    begin(station.wave(1))
    station.wave(1).write_table("part.parquet", rows(3))
    with pytest.raises(StationError, match="wave-00001.* is unfinished"):
        station.finish()

    again = Station(place)
    assert begin(again)
    assert [begin(again.wave(i)) for i in range(2)] == [False, True]
    again.wave(1).write_table("part.parquet", rows(4))
    again.wave(1).finish()
    assert again.finish(rows=3).rows == 3
    assert again.read_table()["key"].to_pylist() == [1, 2, 4]


def test_waves_of_another_recipe_are_neither_removed_nor_taken_over(tmp_path: Path) -> None:
    station = Station(tmp_path / "selection")
    begin(station)
    begin(station.wave(0))
    station.wave(0).finish()
    with pytest.raises(StationConflictError, match="1 of its waves were written by another recipe"):
        begin(Station(tmp_path / "selection"), RECIPE.replace("64", "65"))
    assert station.wave(0).is_finished()


def test_waves_survive_other_inputs_and_judge_their_own(tmp_path: Path) -> None:
    station = Station(tmp_path / "selection")
    begin(station)
    begin(station.wave(0), inputs={"shards": "1"})
    station.wave(0).finish()
    again = Station(tmp_path / "selection")
    assert begin(again, inputs={"scores": "another"})
    assert not begin(again.wave(0), inputs={"shards": "1"})
    with pytest.raises(StationConflictError, match="input 'shards' was 1 and is 2"):
        begin(again.wave(0), inputs={"shards": "2"})


@pytest.mark.parametrize("harm", [os.unlink, lambda path: os.truncate(path, 5)])
def test_a_part_that_was_lost_or_cut_after_the_end_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    station = written(tmp_path / "selection", 1)
    harm(tmp_path / "selection" / "part-00000.parquet")
    with pytest.raises(StationError, match=r"part-00000.parquet: expected \d+ bytes, found"):
        station.require("selection")


def test_files_named_to_keep_survive_for_the_same_recipe_only(tmp_path: Path) -> None:
    station = Station(tmp_path / "base")
    for fingerprint, expected in (("a", None), ("a", b"weights"), ("b", None)):
        station.begin(fingerprint, "{}", "checkpoint", {}, keep=("checkpoints/",))
        assert station.store.get("checkpoints/step-1/x.bin") == expected
        station.put_file("checkpoints/step-1/x.bin", b"weights")


def test_a_directory_with_somebody_elses_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StationError, match="did not write"):
        begin(Station(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_lost_part_is_noticed_before_the_manifest_is_written(place: str) -> None:
    station = Station(place)
    begin(station)
    station.write_table("part-00000.parquet", rows(1, 2))
    with pytest.raises(StationError, match="expected 3 rows, found 2"):
        station.finish(rows=3)
    assert not station.is_finished()


def test_a_wrong_schema_is_found_before_anything_is_read(tmp_path: Path) -> None:
    station = Station(tmp_path / "selection")
    begin(station)
    station.write_table("part-00000.parquet", rows(1).drop_columns(["rank"]))
    station.finish()
    with pytest.raises(SchemaError, match="expected a station of schema 'pool', found 'selection'"):
        station.require("pool")
    with pytest.raises(SchemaError, match="expected column 'rank'"):
        station.require("selection")
    with pytest.raises(SchemaError, match="expected column 'rank'"):
        station.read_table(["rank"])


def test_a_manifest_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "_manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(StationError, match="expected a manifest of emu_ray"):
        Station(tmp_path).require()


def test_an_unfinished_partial_file_is_not_a_part(tmp_path: Path) -> None:
    station = Station(tmp_path / "selection")
    begin(station)
    station.write_table("part-00000.parquet", rows(1))
    (tmp_path / "selection" / "._part-00001.parquet.abc.partial").write_bytes(b"PAR1")
    assert list(station.finish().files) == ["part-00000.parquet"]


def test_folders_and_files_go_up_and_come_down(place: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "index.json").write_text("{}")
    (tmp_path / "model" / "unet" / "weights.bin").write_bytes(os.urandom(1 << 20))
    station = Station(place)
    station.begin("ffff", "{}", "checkpoint", {})
    station.upload_folder(tmp_path / "model", "pipeline")
    station.put_file("notes.txt", b"fine")
    manifest = station.finish(extra={"images_seen": 64})
    assert manifest.rows is None and manifest.extra == {"images_seen": 64}
    assert sorted(manifest.files) == ["notes.txt", "pipeline/index.json", "pipeline/unet/weights.bin"]
    there = station.download("pipeline", tmp_path / "down")
    assert (there / "unet" / "weights.bin").read_bytes() == (tmp_path / "model" / "unet" / "weights.bin").read_bytes()
    assert not (tmp_path / "down" / "notes.txt").exists()
    assert station.get_bytes("notes.txt") == b"fine"
    with pytest.raises(StationMissingError, match="pipelin doesn't exist"):
        station.download("pipelin", tmp_path / "down")


class FullDisk(fs.FileSystemHandler):
    """A disk that takes the name of a file and none of its bytes."""

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        raise OSError(28, "No space left on device")

    def __getattr__(self, name: str) -> Callable[..., object]:
        raise AttributeError(name)


FullDisk.__abstractmethods__ = frozenset()


def test_a_full_disk_is_one_sentence_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    station = Station(tmp_path / "selection")
    begin(station)
    full = fs.PyFileSystem(FullDisk())
    monkeypatch.setattr(station.store, "filesystem", lambda: (full, station.uri))
    with pytest.raises(StationError, match=r"cannot write .*part-00000.parquet: .*No space left on device") as raised:
        station.write_table("part-00000.parquet", rows(1))
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path / "selection") == ["_started.json"]


def test_row_groups_are_cut_where_the_bytes_are(tmp_path: Path) -> None:
    sizes = [10] * 9000 + [3 << 20] * 30 + [40 << 20] + [0] * 5
    table = pa.table({"image": pa.array([b"x" * n for n in sizes], pa.binary()), "number": range(len(sizes))})
    station = Station(tmp_path / "pool")
    station.write_table("part-00000.parquet", table)
    station.write_table("empty.parquet", table.slice(0, 0))
    file = pq.ParquetFile(tmp_path / "pool" / "part-00000.parquet")
    groups = [file.read_row_group(n) for n in range(file.num_row_groups)]
    assert pa.concat_tables(groups).equals(table)
    heavy = [pc.sum(pc.binary_length(g["image"])).as_py() for g in groups]
    assert all(n <= 16 << 20 or len(g) == 1 for n, g in zip(heavy, groups, strict=True)) and len(groups) < 12
    assert pq.read_table(tmp_path / "pool" / "empty.parquet").schema.equals(table.schema)


def test_a_real_full_device_is_one_sentence(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    station = Station(tmp_path)
    (tmp_path / "._x.partial").symlink_to("/dev/full")
    import emu_ray.stations.store as store

    before, store._partial_path = store._partial_path, lambda path: str(tmp_path / "._x.partial")
    try:
        with pytest.raises(StationError, match="No space left on device"):
            station.put_file("part.bin", b"0" * (1 << 20))
    finally:
        store._partial_path = before
    assert not (tmp_path / "part.bin").exists()


def test_a_place_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StationError, match="cannot .*runs"):
        begin(Station(tmp_path / "runs" / "selection"))


def test_a_vanished_bucket_is_one_sentence(s3: object) -> None:
    with pytest.raises(StationError, match="s3://no-such-bucket-here") as raised:
        begin(Station("s3://no-such-bucket-here/selection"))
    assert "\n" not in str(raised.value)


def test_a_compressed_file_comes_back_as_it_was(place: str, tmp_path: Path) -> None:
    station, packed = Station(place), gzip.compress(b"hello")
    station.put_file("words.txt.gz", packed)
    station.download("words.txt.gz", tmp_path / "down")
    assert station.get_bytes("words.txt.gz") == (tmp_path / "down" / "words.txt.gz").read_bytes() == packed


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StationError, match="s3://bucket/prefix"):
        Station("ftp://host/runs")


def test_the_fingerprint_follows_recipe_and_inputs_alone() -> None:
    base = Manifest(station="/a", schema="pool", rows=1, recipe_fingerprint="f", inputs={"source": "1"})
    moved = Manifest(station="/b", schema="pool", rows=1, recipe_fingerprint="f", inputs={"source": "1"}, seconds=9)
    other = Manifest(station="/a", schema="pool", rows=1, recipe_fingerprint="f", inputs={"source": "2"})
    assert base.fingerprint == moved.fingerprint != other.fingerprint
    assert Manifest.from_json(json.dumps(json.loads(base.to_json())), "here") == base
