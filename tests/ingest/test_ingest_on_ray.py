"""The pool station from end to end on a real local Ray."""

from __future__ import annotations

import dataclasses
import functools
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from emu_ray.errors import InputError, SchemaError, StationConflictError, StationError, find_in_chain
from emu_ray.ingest.on_ray import IngestRecipe, WaveSettings, _cut, _write_shard, ingest, ingest_tables
from emu_ray.ingest.pairs import POOL, Caps, Pair, pool_tables
from emu_ray.stations import Station

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> Path:
    """Seven images, of which two are equal, one is broken and one has no caption."""
    path = tmp_path_factory.mktemp("images")
    for i in range(7):
        (path / f"{i}.png").write_bytes(picture(0 if i == 6 else i, 10 + (i % 6), 8))
        (path / f"{i}.txt").write_text("the same words")
    (path / "3.png").write_bytes(b"not an image")
    (path / "4.txt").unlink()
    return path


def pool_of(root: Path | str) -> pa.Table:
    return Station(f"{root}/pool").read_table()


def test_no_row_is_lost_and_what_is_wrong_is_counted(tmp_path: Path, folder: Path) -> None:
    recipe = IngestRecipe(
        root=str(tmp_path), source=str(folder), images_per_shard=2, rows_per_file=3, shards_per_wave=3
    )
    manifest = ingest(recipe)
    assert manifest.rows == 7
    assert manifest.counts == {"rows": 7, "empty_caption": 1, "unreadable_header": 1, "empty_image": 0}
    pool = pool_of(tmp_path)
    assert pool.schema.equals(POOL)
    assert pool["source"].to_pylist() == [f"{i}.png" for i in range(7)]
    assert pool["width_px"].to_pylist() == [10, 11, 12, None, 14, 15, 10]
    assert len(pc.unique(pool["key"])) == 7, "equal pairs in different shards need different keys"
    assert sorted(p.name for p in (tmp_path / "pool").glob("wave-*")) == ["wave-00000", "wave-00001"]


def test_keys_and_rows_do_not_depend_on_how_the_work_is_cut(tmp_path: Path, folder: Path) -> None:
    recipe = IngestRecipe(root=str(tmp_path / "a"), source=str(folder), images_per_shard=100)
    ingest(recipe)
    ingest(
        dataclasses.replace(recipe, root=str(tmp_path / "b"), images_per_shard=1, shards_per_wave=2, rows_per_file=1)
    )
    assert pool_of(tmp_path / "a").equals(pool_of(tmp_path / "b"))


def test_a_second_run_does_nothing_and_a_changed_source_is_a_conflict(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture())
    recipe = IngestRecipe(root=str(tmp_path / "out"), source=str(tmp_path / "in"))
    first = ingest(recipe)
    assert ingest(recipe) == first
    (tmp_path / "in" / "b.png").write_bytes(picture(1))
    with pytest.raises(StationConflictError, match="input 'source' was"):
        ingest(recipe)


def test_a_broken_tar_ends_the_run_and_its_mending_costs_only_its_wave(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    whole = tar_bytes({"1.png": picture(1), "1.txt": b"one"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(whole)
    (tmp_path / "in" / "b.tar").write_bytes(b"x" * 100)
    recipe = IngestRecipe(root=str(tmp_path / "out"), source=str(tmp_path / "in"), shards_per_wave=1)
    with pytest.raises(Exception) as raised:
        ingest(recipe)
    found = find_in_chain(raised.value)
    assert isinstance(found, InputError) and "b.tar" in str(found)
    first_wave = tmp_path / "out" / "pool" / "wave-00000" / "_manifest.json"
    before = first_wave.stat().st_mtime_ns
    (tmp_path / "in" / "b.tar").write_bytes(whole)
    assert ingest(recipe).rows == 2
    assert first_wave.stat().st_mtime_ns == before
    assert len(set(pool_of(tmp_path / "out")["key"].to_pylist())) == 2


def tar_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_a_tar_without_images_leaves_no_pool(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"1.txt": b"words"}))
    with pytest.raises(InputError, match="expected at least one image or URL in the source of .*, found none"):
        ingest(IngestRecipe(root=str(tmp_path / "out"), source=str(tmp_path / "a.tar")))
    assert not Station(tmp_path / "out" / "pool").is_finished()


def test_parquet_is_ingested_with_its_own_column_names(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    table = pa.table({"image": [picture(i) for i in range(5)], "TEXT": list("abcde"), "likes": range(5)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    ingest(IngestRecipe(root=str(tmp_path / "out"), source=str(tmp_path / "a.parquet")))
    pool = pool_of(tmp_path / "out")
    assert pool["caption"].to_pylist() == list("abcde") and pool["likes"].to_pylist() == list(range(5))


def tables_with_truth(shard: int) -> list[pa.Table]:
    pairs = [Pair(image=b"", caption=f"{shard} {i}", address=f"{shard}/{i}") for i in range(3)]
    return [t.append_column("truth", pa.array(["{}"] * len(t))) for t in pool_tables(pairs, Caps())]


def table_without_key(shard: int) -> pa.Table:
    return pa.table({"image": [b""]})


def test_generated_pools_may_have_more_columns_and_must_have_the_pools(tmp_path: Path) -> None:
    recipe = IngestRecipe(root=str(tmp_path), source="haystack")
    write = functools.partial(ingest_tables, inputs={}, settings=WaveSettings(shards_per_wave=2, rows_per_file=10))
    assert write(Station(tmp_path / "a"), recipe, [0, 1, 2], tables_with_truth).rows == 9
    assert Station(tmp_path / "a").read_table(["truth"]).num_rows == 9
    with pytest.raises(Exception) as raised:
        write(Station(tmp_path / "b"), recipe, [0], table_without_key)
    assert isinstance(find_in_chain(raised.value), SchemaError)


def test_a_task_that_runs_twice_replaces_its_parts(tmp_path: Path) -> None:
    import ray

    station = Station(tmp_path)
    item: dict[str, Any] = {"index": 5, "shard": [ray.cloudpickle.dumps(7)]}
    for _ in range(2):
        assert _write_shard(item, station, tables_with_truth, rows_per_file=2)["rows"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-000005-0000.parquet", "part-000005-0001.parquet"]


def test_a_retry_that_writes_fewer_parts_removes_those_of_the_first_attempt_and_no_others(tmp_path: Path) -> None:
    import ray

    station = Station(tmp_path)
    item: dict[str, Any] = {"index": 5, "shard": [ray.cloudpickle.dumps(7)]}
    _write_shard({**item, "index": 50}, station, tables_with_truth, rows_per_file=3)
    for rows_per_file in (1, 2):
        _write_shard(item, station, tables_with_truth, rows_per_file)
    parts = ["part-000005-0000.parquet", "part-000005-0001.parquet", "part-000050-0000.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == parts


def test_images_that_vanish_while_a_pool_is_written_end_the_run_and_the_same_command_ends_the_work(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    """Two waves of one row group: before the second, the folder of the images is away, as an unmounted disk is."""
    for folder in ("first", "second"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "a.png").write_bytes(picture())
    paths = ["first/a.png"] * 600 + ["second/a.png"] * 600
    pq.write_table(pa.table({"path": paths}), tmp_path / "in" / "a.parquet", row_group_size=600)
    away = (tmp_path / "in" / "second").rename(tmp_path / "away")
    recipe = IngestRecipe(
        root=str(tmp_path), source=str(tmp_path / "in"), layout="parquet", shards_per_wave=1, max_error_share=1.0
    )
    with pytest.raises(StationError, match=r"wave 2 of 2.* jumped from 0.0% to 100.0% \(--max-error-jump 0.25\)"):
        ingest(recipe)
    with pytest.raises(StationError, match="600 of 600 rows name an image file that isn't there, at most 50%"):
        ingest(dataclasses.replace(recipe, max_error_share=0.5))
    assert [Station(tmp_path / "pool").wave(n).is_finished() for n in range(2)] == [True, False]
    away.rename(tmp_path / "in" / "second")
    assert ingest(recipe).counts == {"rows": 1200, "empty_caption": 1200, "unreadable_header": 0, "empty_image": 0}


def test_one_shard_of_missing_images_ends_the_run_although_the_wave_is_large(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    paths = ["a.png"] * 1800 + ["gone.png"] * 600
    pq.write_table(pa.table({"path": paths}), tmp_path / "a.parquet", row_group_size=600)
    recipe = IngestRecipe(root=str(tmp_path), source=str(tmp_path / "a.parquet"))
    with pytest.raises(StationError, match="wave 1 of 1, one of its shards: 600 of 600 rows name"):
        ingest(recipe)
    accepted = ingest(dataclasses.replace(recipe, max_error_share=1.0))
    assert (accepted.rows, accepted.counts["fetch_file_missing"]) == (2400, 600)


def test_cutting_keeps_every_row_in_order() -> None:
    tables = [pa.table({"a": range(start, stop)}) for start, stop in ((0, 5), (5, 5), (5, 6), (6, 25), (25, 27))]
    cut = list(_cut(tables, 4))
    assert [len(t) for t in cut] == [4] * 6 + [3]
    assert pa.concat_tables(cut)["a"].to_pylist() == list(range(27))
    assert [len(t) for t in _cut(tables, 100, bytes_per_file=40)] == [5, 20, 2]


def test_the_stamps_become_a_pool(tmp_path: Path, stamps: Path) -> None:
    manifest = ingest(IngestRecipe(root=str(tmp_path), source=str(stamps)))
    pool = pool_of(tmp_path)
    assert manifest.counts == {"rows": 398, "empty_caption": 0, "unreadable_header": 0, "empty_image": 0}
    assert len(pc.unique(pool["key"])) == 398
    assert pc.max(pool["width_px"]).as_py() <= 320 and pc.min(pool["height_px"]).as_py() > 0
