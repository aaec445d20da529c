"""The latents station on a real local Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from emu_ray.encoding.on_ray import EncodeRecipe, encode
from emu_ray.errors import InputError, StationConflictError
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Station

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow]
PICTURES = 7


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path, noise_picture: Callable[..., bytes]) -> EncodeRecipe:
    """Seven pictures in two files; the selection rejects the first, and the last has no caption."""
    captions = [f"ball {i}" for i in range(PICTURES - 1)] + [""]
    pairs = [Pair(image=noise_picture(i, 20, 16), caption=c, address=str(i)) for i, c in enumerate(captions)]
    pool = pa.concat_tables(pool_tables(pairs, Caps()))
    reasons = ["offensive", *[""] * (PICTURES - 1)]
    selection = pa.table({"key": pool["key"], "reject_reason": reasons, "rank": pa.nulls(PICTURES, pa.float32())})
    for name, table in (("pool", pool), ("selection", selection)):
        station = Station(tmp_path / name)
        station.begin("by hand", "{}", name, {})
        station.write_table("part-00000.parquet", table.slice(0, 4))
        station.write_table("part-00001.parquet", table.slice(4))
        station.finish()
    return EncodeRecipe(
        root=str(tmp_path),
        use="pretrain",
        source="pool",
        autoencoder=str(checkpoint / "vae"),
        size_px=16,
        actors=1,
        rows_per_wave=4,
    )


def test_every_selected_pair_with_a_caption_is_encoded_once_and_only_what_is_missing_is_done_again(
    recipe: EncodeRecipe,
) -> None:
    pool = Station(f"{recipe.root}/pool").read_table()
    assert encode(recipe).rows == PICTURES - 2
    latents = Station(f"{recipe.root}/latents/pretrain").read_table()
    assert sorted(latents["key"].to_pylist()) == sorted(pool["key"].to_pylist()[1:-1])
    assert set(latents["bucket"].to_pylist()) == {"16x16"}
    assert {len(v) for v in latents["latent_mean"].to_pylist()} == {4 * 4 * 4}

    station = Station(f"{recipe.root}/latents/pretrain")  # as a driver killed at its very end leaves it
    station.store.delete("_manifest.json")
    station.wave(1).store.delete("_manifest.json")
    first = Path(station.wave(0).path("part-000000.parquet"))
    before = first.stat().st_mtime_ns
    assert encode(recipe).rows == PICTURES - 2
    assert first.stat().st_mtime_ns == before
    assert station.read_table().equals(latents)
    with pytest.raises(StationConflictError, match="size_px was 16 and is 8"):
        encode(dataclasses.replace(recipe, size_px=8))


def test_a_selection_that_kept_nothing_is_one_sentence(recipe: EncodeRecipe) -> None:
    with pytest.raises(InputError, match="no picture .* is left to encode"):
        encode(dataclasses.replace(recipe, keep_reasons=("no_such_reason",)))
