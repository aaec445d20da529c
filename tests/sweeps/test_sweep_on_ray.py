"""The sweep itself, under Ray Tune, on a pipeline of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.config import to_json
from emu_ray.errors import InputError, JobFailedError, StationMissingError
from emu_ray.evaluation.prompts import haystack_prompts
from emu_ray.generation import SamplingSettings
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station
from emu_ray.sweeps import on_ray
from emu_ray.sweeps.on_ray import SweepRecipe, failure, sweep, trial
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.start import DenoiserTraining

PAIRS = 8


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> SweepRecipe:
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
def test_each_size_is_trained_once_and_judged_on_its_way(ray_local: None, recipe: SweepRecipe) -> None:
    manifest = sweep(recipe)
    rows = manifest.extra["rows"]
    assert Path(recipe.root, "ray_tune", f"sweep-{manifest.fingerprint}").is_dir(), "inputs are missing in the name"
    assert [(row["set_size"], row["steps"]) for row in rows] == [(0, 0), (6, 2), (6, 4)]
    assert rows[0]["appeal"]["tie"] == 100  # the base against itself
    assert Station(f"{recipe.root}/sweep").get_bytes("plot.png").startswith(b"\x89PNG")

    station = Station(f"{recipe.root}/sweep")  # as a driver that was killed at the very end would have left it
    station.store.delete("_manifest.json")
    kept = json.loads(station.get_bytes("trial-6.json"))
    kept[0]["steps"] = 3
    station.put_file("trial-6.json", json.dumps(kept).encode())
    assert [row["steps"] for row in sweep(recipe).extra["rows"]] == [0, 3, 4], "a finished trial was run again"


@pytest.mark.slow
def test_a_users_mistake_in_a_trial_reaches_them_as_it_was_said(ray_local: None, recipe: SweepRecipe) -> None:
    with pytest.raises(StationMissingError, match="^the folder /nowhere doesn't exist") as raised:
        sweep(replace(recipe, attributes="/nowhere/attributes.safetensors", sizes=(0,)))
    assert "Traceback" not in str(raised.value)


def test_a_crash_in_a_trial_is_one_sentence_with_its_last_line(recipe: SweepRecipe) -> None:
    crash = RuntimeError("ray::trial()\n  File ..., line 1\nZeroDivisionError: division by zero\n")
    said = failure([crash, crash], recipe)
    assert isinstance(said, JobFailedError)
    assert str(said).startswith("2 of 2 trials failed, the first with: ZeroDivisionError: division by zero; ")
    assert "line 1" not in str(said)
    assert str(failure([crash, InputError("an empty folder")], recipe)) == "an empty folder"


class _Started(Exception):
    """Ends a trial where its training would begin."""


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_a_trial_computes_where_it_reserved(
    gpus: int, device: str, recipe: SweepRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    class Generator:
        def __init__(self, checkpoint: str, *, device: str) -> None:
            devices.append(device)

    def train_denoiser(tuning: DenoiserTraining, data: Any, worker: LocalWorker, look: Any) -> None:
        devices.append(str(worker.device))
        raise _Started

    monkeypatch.setattr(on_ray, "Generator", Generator)
    monkeypatch.setattr(on_ray, "_Judges", lambda *_: None)
    monkeypatch.setattr(on_ray, "train_denoiser", train_denoiser)
    with pytest.raises(_Started):
        trial({"set_size": 6}, to_json(replace(recipe, gpus_each=gpus)))
    assert devices == [device, device]
