"""A set read in windows: every row once an epoch, the same rows for any number of workers and from any step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from emu_ray.errors import InputError, RecipeError, StationError
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station
from emu_ray.training.feed import Share
from emu_ray.training.order import BatchPlan
from emu_ray.training.streaming.on_ray import RayReader
from emu_ray.training.streaming.order import RowGroups, StreamOrder, StreamRecipe, Window
from emu_ray.training.streaming.scan import scan_latents
from emu_ray.training.streaming.windows import WindowedFeed

ROWS = {"32x32": 96, "48x24": 64}


def _groups(rows_a_group: int = 8) -> dict[str, RowGroups]:
    found = {bucket: RowGroups() for bucket in ROWS}
    for bucket, rows in ROWS.items():
        for n in range(-(-rows // rows_a_group)):
            found[bucket].add(f"{bucket}.parquet", n, min(rows_a_group, rows - n * rows_a_group))
    return found


def _order(batch: int | dict[str, int] = 16, lanes: int = 4, rows_a_group: int = 8) -> StreamOrder:
    return StreamOrder(_groups(rows_a_group), BatchPlan(ROWS, batch, seed=3), lanes=lanes, window_groups=2)


def _row_of(order: StreamOrder, window: Window, place: int) -> tuple[str, int]:
    """(bucket, row of the bucket's file)."""
    groups = order.row_groups(window)
    starts = np.cumsum([0, *(g.rows for g in groups)])
    row = int(order.mixed(window)[place])
    which = int(np.searchsorted(starts, row, side="right")) - 1
    return window.bucket, groups[which].group * 8 + row - int(starts[which])


def _read(order: StreamOrder, steps: range, rank: int, world: int) -> dict[tuple[int, int], tuple[str, int]]:
    """(step, sample) -> row."""
    return {
        (step, int(sample)): _row_of(order, piece.window, int(place))
        for step in steps
        for piece in order.pieces(step, rank, world)
        for place, sample in zip(piece.places, piece.samples, strict=True)
    }


def test_an_epoch_reads_every_row_once() -> None:
    order = _order()
    assert order.plan.steps_a_round == 10
    for round_ in range(3):
        read = Counter(_read(order, range(round_ * 10, round_ * 10 + 10), 0, 1).values())
        assert len(read) == sum(ROWS.values())
        assert set(read.values()) == {1}


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_any_number_of_workers_reads_the_same(world: int) -> None:
    order = _order()
    alone = _read(order, range(25), 0, 1)
    together: dict = {}
    for rank in range(world):
        together |= _read(order, range(25), rank, world)
    assert together == alone


def test_a_worker_whose_number_divides_the_lanes_reads_windows_of_its_own() -> None:
    order = _order()
    seen = [set(order.windows(0, 20, rank, 2)) for rank in range(2)]
    assert seen[0] and seen[1]
    assert not seen[0] & seen[1]


def test_from_any_step_the_same_windows_follow() -> None:
    order = _order()
    every = list(order.windows(0, 40, 1, 2))
    later = list(order.windows(17, 40, 1, 2))
    assert len(set(every)) == len(every)
    assert [w for w in later if w in every[len(every) - len(later) + 2 :]] == every[len(every) - len(later) + 2 :]
    needed = {piece.window for step in range(17, 40) for piece in order.pieces(step, 1, 2)}
    assert set(later) == needed


def test_epochs_have_orders_of_their_own_and_rows_of_a_batch_come_from_many_groups() -> None:
    order = _order()
    first, second = (list(_read(order, range(r * 10, r * 10 + 10), 0, 1).values()) for r in range(2))
    assert first != second
    batch = [row // 8 for bucket, row in _read(order, range(1), 0, 1).values()]
    assert len(set(batch)) >= 4


def test_a_bucket_of_few_row_groups_has_fewer_lanes_and_odd_sizes_lose_no_row() -> None:
    order = _order(batch={"32x32": 16, "48x24": 8}, lanes=8, rows_a_group=32)
    read = Counter(_read_any(order, range(14)))
    assert len(read) == sum(ROWS.values())


def _read_any(order: StreamOrder, steps: range) -> Iterator[tuple[Window, int]]:
    for step in steps:
        for piece in order.pieces(step, 0, 1):
            for place in piece.places:
                yield piece.window, int(place)


def _in_memory(order: StreamOrder, windows: Iterator[Window]) -> Iterator[pa.Table]:
    """The rows of the windows in tables cut anywhere."""
    for window in windows:
        rows = [_row_of(order, window, place) for place in range(len(order.mixed(window)))]
        table = pa.table({"key": [row + (1000 if bucket == "48x24" else 0) for bucket, row in rows]})
        yield from (table.slice(0, 5), table.slice(5))


def _keys(bucket: str, table: pa.Table, rngs: list[np.random.Generator]) -> dict[str, torch.Tensor]:
    return {"key": torch.tensor(table["key"].to_pylist()), "draw": torch.tensor([g.random() for g in rngs])}


def test_a_feed_of_windows_gives_each_share_its_rows_and_their_own_randomness() -> None:
    order = _order()
    feed = WindowedFeed(order, lambda windows: _in_memory(order, windows), _keys, 0, 1)
    straight = list(feed.shares(0, 30))
    later = list(feed.shares(13, 30))
    expected = _read(order, range(30), 0, 1)
    for step, share in enumerate(straight):
        rows = {row + (1000 if bucket == "48x24" else 0) for (at, _), (bucket, row) in expected.items() if at == step}
        assert sorted(share.batch["key"].tolist()) == sorted(rows)
    for a, b in zip(straight[13:], later, strict=True):
        assert all(torch.equal(a.batch[k], b.batch[k]) for k in a.batch)
    assert straight[0].names[0].startswith("key ")


def test_an_empty_bucket_or_one_without_a_batch_size_is_refused() -> None:
    with pytest.raises(RecipeError, match="found none in 48x24"):
        BatchPlan({"32x32": 5, "48x24": 0}, 4, 0)
    with pytest.raises(RecipeError, match="no batch size is given for the bucket 48x24"):
        BatchPlan(ROWS, {"32x32": 4}, 0)


def test_each_bucket_comes_as_often_as_its_pictures_ask_and_batches_hold_one_bucket() -> None:
    plan = BatchPlan({"a": 100, "b": 300}, {"a": 10, "b": 5}, seed=1)
    reads = [plan.at(step) for step in range(plan.steps_a_round * 2)]
    assert Counter(r.bucket for r in reads) == {"a": 20, "b": 120}
    assert {r.bucket: r.size for r in reads} == {"a": 10, "b": 5}
    assert [r.images_seen for r in reads] == np.cumsum([0, *(r.size for r in reads)])[:-1].tolist()
    assert [r.in_bucket for r in reads if r.bucket == "a"] == list(range(0, 200, 10))


@pytest.mark.parametrize(
    "rows", [{"a": 96, "b": 160}, {"a": 70, "b": 95, "c": 100, "d": 1735}, {"a": 1900, "b": 3}, {"a": 400_000_000, "b": 900_000}]
)  # fmt: skip
def test_no_bucket_comes_much_more_often_than_its_share(rows: dict[str, int]) -> None:
    plan = BatchPlan(rows, 64, seed=1)
    epochs = {
        name: plan._times[number] * 64 / rows[name] for number, name in enumerate(plan.buckets)
    }  # of each bucket in a round
    assert max(epochs.values()) / min(epochs.values()) < 1.05


def test_a_bucket_rarer_than_a_round_can_show_makes_no_endless_round() -> None:
    plan = BatchPlan({"a": 10**9, "b": 1}, 2048, seed=1)
    assert plan.steps_a_round <= 1_000_000
    assert plan._times.min() == 1


def _station(folder: Path, mixed: bool = False) -> Station:
    station = Station(folder)
    station.begin("any", "{}", "latents", {})
    for number, (bucket, rows) in enumerate(ROWS.items()):
        keys = np.arange(rows) + 1000 * number
        columns = {
            "key": keys,
            "bucket": [bucket] * rows if not mixed else ["32x32", "48x24"] * (rows // 2),
            "latent_mean": [np.full(4, key, np.float16) for key in keys],
            "latent_std": [np.ones(4, np.float16)] * rows,
            "caption": [f"number {key}" for key in keys],
        }
        table = pa.table({f.name: pa.array(list(columns[f.name]), f.type) for f in SCHEMAS["latents"]})
        import pyarrow.parquet as pq

        pq.write_table(table, folder / f"part-{number:06d}.parquet", row_group_size=8)
    station.finish()
    return station


def test_ray_data_reads_the_windows_in_their_order(ray_local: None, tmp_path: Path) -> None:
    station = _station(tmp_path / "latents")
    groups = scan_latents(station).groups
    assert {bucket: own.rows.sum() for bucket, own in groups.items()} == ROWS
    order = StreamOrder(groups, BatchPlan(ROWS, 16, seed=3), lanes=4, window_groups=2)
    reader = RayReader(
        station, order, ["key", "caption", "latent_mean"], StreamRecipe(lanes=4, window_groups=2, readers=2)
    )

    def to_batch(bucket: str, table: pa.Table, rngs: list[np.random.Generator]) -> dict[str, torch.Tensor]:
        means = np.stack(table["latent_mean"].to_pylist())
        assert table["caption"].to_pylist() == [f"number {key}" for key in table["key"].to_pylist()]
        return {"key": torch.tensor(table["key"].to_pylist()), "mean": torch.from_numpy(means[:, 0].astype(np.float32))}

    shares: list[Share] = list(WindowedFeed(order, reader, to_batch, 1, 2).shares(3, 14))
    assert all(torch.equal(s.batch["key"].half(), s.batch["mean"].half()) for s in shares)
    expected = _read(order, range(3, 14), 1, 2)
    for step, share in enumerate(shares, start=3):
        rows = [row + (1000 if bucket == "48x24" else 0) for (at, _), (bucket, row) in expected.items() if at == step]
        assert sorted(share.batch["key"].tolist()) == sorted(rows)


def test_a_row_group_of_several_buckets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected row groups of one bucket each"):
        scan_latents(_station(tmp_path / "latents", mixed=True))


def test_a_lost_part_is_an_error_of_the_step_that_reads_it(ray_local: None, tmp_path: Path) -> None:
    station = _station(tmp_path / "latents")
    groups = scan_latents(station).groups
    (tmp_path / "latents" / "part-000000.parquet").unlink()
    order = StreamOrder(groups, BatchPlan(ROWS, 16, seed=3), lanes=4, window_groups=2)
    reader = RayReader(station, order, ["key"], StreamRecipe())
    from emu_ray.errors import find_in_chain

    with pytest.raises(Exception) as caught:
        list(WindowedFeed(order, reader, _keys, 0, 1).shares(0, 10))
    assert isinstance(find_in_chain(caught.value), StationError)
