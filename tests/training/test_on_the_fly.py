"""Pictures encoded while training reads them: the rows that `encode` would have taken, with the same latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.encoding.encoder import LatentEncoder
from emu_ray.errors import InputError, RecipeError, StationMissingError
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Station
from emu_ray.training.denoiser_run import require_pictures
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.order import BatchPlan
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.stopping import StoppingRecipe
from emu_ray.training.streaming.on_ray import RayReader, WindowReader, encoded
from emu_ray.training.streaming.order import OnTheFly, StreamOrder, StreamRecipe
from emu_ray.training.streaming.pictures import COLUMNS, WindowEncoder, picture_groups

HOW = OnTheFly(size_px=16, max_aspect=4.0, bucket_step_px=4, batch_size=3)
SHAPES = [(16, 16), (40, 12), (12, 40), (20, 20)]


@pytest.fixture
def root(tmp_path: Path, noise_picture: Callable[..., bytes]) -> Path:
    """Twenty pictures of four shapes; the first is rejected, the last has no caption."""
    pairs = [
        Pair(image=noise_picture(i, *SHAPES[i % 4]), caption=f"ball {i}" if i < 19 else "", address=str(i)) for i in range(20)
    ]  # fmt: skip
    pool = pa.concat_tables(pool_tables(pairs, Caps()))
    reasons = ["offensive", *[""] * 19]
    selection = pa.table({"key": pool["key"], "reject_reason": reasons, "rank": pa.nulls(20, pa.float64())})
    for name, table in (("pool", pool), ("selection", selection)):
        station = Station(tmp_path / name)
        station.begin("by hand", "{}", name, {})
        station.write_groups("part-00000.parquet", [table.slice(0, 6), table.slice(6, 6)])
        station.write_table("part-00001.parquet", table.slice(12))
        station.finish()
    return tmp_path


def test_the_kept_pictures_with_captions_come_by_the_bucket_of_their_shape(root: Path) -> None:
    groups = picture_groups(str(root), HOW)
    assert {bucket: int(own.rows.sum()) for bucket, own in groups.items()} == {"16x16": 8, "32x8": 5, "8x32": 5}
    every = picture_groups(str(root), replace(HOW, keep_reasons=None))
    assert sum(own.rows.sum() for own in every.values()) == 19
    with pytest.raises(InputError, match="no picture .* is left to train on"):
        picture_groups(str(root), replace(HOW, keep_reasons=("nothing",)))


def test_each_picture_is_encoded_as_the_encode_job_would(root: Path, checkpoint: Path) -> None:
    groups = picture_groups(str(root), HOW)
    plan = BatchPlan({bucket: int(own.rows.sum()) for bucket, own in groups.items()}, 4, seed=1)
    order = StreamOrder(groups, plan, lanes=1, window_groups=2)
    reader = RayReader(Station(root / "pool"), order, COLUMNS, StreamRecipe(encode=HOW))
    read, encode = WindowReader(Station(root / "pool"), COLUMNS), WindowEncoder(str(checkpoint / "vae"), HOW)
    pool = {row["key"]: row for row in Station(root / "pool").read_table().to_pylist()}
    station = LatentEncoder(str(checkpoint / "vae"), HOW.sizes)
    seen = []
    for window in order.windows(0, 3 * plan.steps_a_round, 0, 1):
        rows = encode(read(pa.Table.from_pylist([reader._item(window)])))
        assert len(rows) == sum(group.rows for group in order.row_groups(window))
        for row in rows.to_pylist():
            own = pool[row["key"]]
            alone = station({name: np.array([own[name]], object) for name in COLUMNS})
            assert alone["bucket"][0] == window.bucket
            assert np.allclose(row["latent_mean"], alone["latent_mean"][0], atol=1e-2)
            assert row["caption"] == own["caption"]
            assert (row["original_width_px"], row["original_height_px"]) == (own["width_px"], own["height_px"])
            seen.append(row["key"])
    assert len(set(seen)) == 18


def test_a_run_is_refused_where_its_pictures_can_not_be_had(root: Path, checkpoint: Path) -> None:
    training = DenoiserTraining(
        start=str(checkpoint), loop=LoopRecipe(steps=1, batch_size=4), stream=StreamRecipe(encode=HOW)
    )
    assert set(require_pictures(str(root), training, HOW)) == {"pool", "selection"}
    with pytest.raises(RecipeError, match="can't hold pairs out"):
        require_pictures(str(root), replace(training, stopping=StoppingRecipe()), HOW)
    with pytest.raises(StationMissingError):
        require_pictures(str(root), training, replace(HOW, source="chosen"))
    with pytest.raises(RecipeError, match="size_px must be a multiple of bucket_step_px"):
        OnTheFly(size_px=17, max_aspect=2.0)


@pytest.mark.usefixtures("ray_local")
def test_the_actors_that_encode_may_ask_for_gpus() -> None:
    import ray

    windows = ray.data.from_items([{"table": b""}])
    planned = encoded("autoencoder", replace(HOW, gpus_each=0.5))(windows)  # Ray Data checks here what it is asked for
    assert isinstance(planned, ray.data.Dataset)
