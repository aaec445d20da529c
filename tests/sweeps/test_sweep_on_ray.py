"""The sweep itself, under Ray Tune, on a pipeline of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.evaluation.prompts import haystack_prompts
from emu_ray.generation import SamplingSettings
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station
from emu_ray.sweeps.on_ray import SweepRecipe, sweep
from emu_ray.training.denoiser import DenoiserTraining
from emu_ray.training.loop import LoopRecipe

PAIRS = 8


@pytest.fixture
def recipe(ray_local: None, checkpoint: Path, tmp_path: Path) -> SweepRecipe:
    latents = Station(tmp_path / "latents" / "quality")
    latents.begin("any", "{}", "latents", {})
    numbers = np.random.default_rng(0).normal(size=(PAIRS, 4 * 4 * 4)).astype(np.float16)
    columns = {
        "key": range(PAIRS),
        "bucket": ["16x16"] * PAIRS,
        "latent_mean": list(numbers),
        "latent_std": list(np.abs(numbers)),
        "caption": haystack_prompts(PAIRS),
    }
    latents.write_table("part-000000.parquet", pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMAS["latents"]}))  # fmt: skip
    latents.finish()
    loop = LoopRecipe(steps=4, batch_size=4, warmup_steps=1)
    return SweepRecipe(
        root=str(tmp_path),
        tuning=DenoiserTraining(start=str(checkpoint), loop=loop),
        prompts=haystack_prompts(4),
        sizes=(0, 6),
        steps=(2, 4),
        settings=SamplingSettings(steps=2),
        concurrent=1,
    )


@pytest.mark.slow
def test_each_size_is_trained_once_and_judged_on_its_way(recipe: SweepRecipe) -> None:
    rows = sweep(recipe).extra["rows"]
    assert [(row["set_size"], row["steps"]) for row in rows] == [(0, 0), (6, 2), (6, 4)]
    assert rows[0]["appeal"]["tie"] == 100  # the base against itself
    assert Station(f"{recipe.root}/sweep").get_bytes("plot.png").startswith(b"\x89PNG")

    station = Station(f"{recipe.root}/sweep")  # as a driver that was killed at the very end would have left it
    station.store.delete("_manifest.json")
    kept = json.loads(station.get_bytes("trial-6.json"))
    kept[0]["steps"] = 3
    station.put_file("trial-6.json", json.dumps(kept).encode())
    assert [row["steps"] for row in sweep(recipe).extra["rows"]] == [0, 3, 4], "a finished trial was run again"
