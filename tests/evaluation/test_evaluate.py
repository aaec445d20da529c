"""The comparison and its report, from stations written by hand: pictures of known quality, prompts of known content."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.selecting import SelectRecipe, select
from emu_ray.errors import InputError
from emu_ray.evaluation.evaluate import EvaluateRecipe, evaluate
from emu_ray.generation.samples import to_png
from emu_ray.haystack.pool import HaystackSource, chunk_table
from emu_ray.haystack.render import render
from emu_ray.haystack.world import captions, draw_scenes
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station
from emu_ray.stations.folders import base_folder

PROMPTS = 24
pytestmark = pytest.mark.skipif(not (base_folder() / "judge").exists(), reason="no judge: run `make base`")


def write(root: Path, name: str, schema: str, table: pa.Table, **said: dict) -> None:
    station = Station(root / name)
    station.begin("by hand", "{}", schema, {})
    station.write_table("part-00000.parquet", table)
    station.finish(**said)


@pytest.fixture
def root(tmp_path: Path, make_scores: Callable[..., pa.Table]) -> Path:
    """Eight pool rows, of which one is rejected and two are chosen; the base draws underexposed, the tuned model beautifully."""
    pool = chunk_table(HaystackSource(rows=8, side_px=64, seed=5).chunks()[0])
    write(tmp_path, "pool", "pool", pool)
    keys = pool["key"].to_pylist()
    measured = make_scores({"key": keys[0], "width_px": 9}, *({"key": key} for key in keys[1:]))
    write(tmp_path, "scores", "scores", measured)
    select(SelectRecipe(root=str(tmp_path), policy=SelectionPolicy(min_short_side_px=64)))
    two = {"votes": [None] * 2, "annotator": ["simulated"] * 2}
    chosen = {**{n: pool[n].slice(1, 2).to_pylist() for n in ("key", "image", "caption")}, **two}
    extra = {"annotator": "simulated", "error_rate": 0.05}
    write(tmp_path, "chosen", "chosen", pa.table(chosen, SCHEMAS["chosen"]), counts={"candidates": 7}, extra=extra)
    scenes = draw_scenes(np.random.default_rng(1), PROMPTS, photogenic=True)
    dark = dataclasses.replace(scenes, lighting=np.full(PROMPTS, 2))
    for run, drawn in (("base", dark), ("tuned", scenes)):
        write(tmp_path, f"samples/{run}", "samples", samples(captions(scenes), render(drawn, 64)))
    return tmp_path


def samples(prompts: list[str], images: np.ndarray, first_seed: int = 1000) -> pa.Table:
    columns = {
        "prompt_id": range(len(prompts)),
        "prompt": prompts,
        "seed": range(first_seed, first_seed + len(prompts)),
        "image": [to_png(i) for i in images],
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMAS["samples"]})


def test_the_better_pictures_win_and_the_summary_says_so(root: Path) -> None:
    evaluate(EvaluateRecipe(root=str(root)))
    summary = json.loads((root / "summary.json").read_text())
    appeal, faithful = summary["appeal"], summary["faithfulness"]
    for shares in (appeal, faithful):
        assert shares["win"] + shares["tie"] + shares["lose"] == pytest.approx(100)
        assert shares["ci95"][0] <= shares["win"] <= shares["ci95"][1]
    assert appeal["win"] > 90 and not faithful["is_significantly_worse"]
    assert summary["funnel"]["kept"] == 7 and summary["funnel"]["too_small"] == 1
    assert summary["filters"]["too_small"]["flagged"] == 1
    page = (root / "report.html").read_text()
    assert page.count("<img") >= 2 * 10 + 7 and "A simulated annotator" in page


def test_a_pool_without_truth_is_compared_all_the_same(root: Path) -> None:
    pool = Station(root / "pool").read_table()
    for file in (root / "pool").iterdir():
        file.unlink()
    write(root, "pool", "pool", pool.drop_columns(["truth"]))
    evaluate(EvaluateRecipe(root=str(root)))
    assert json.loads((root / "summary.json").read_text())["filters"] == {}


def test_runs_of_different_seeds_are_not_compared(root: Path) -> None:
    table = Station(root / "samples" / "tuned").read_table()
    for file in (root / "samples" / "tuned").iterdir():
        file.unlink()
    write(root, "samples/tuned", "samples", table.set_column(2, "seed", pa.array(range(PROMPTS), pa.int64())))
    with pytest.raises(InputError, match="differ in column 'seed'"):
        evaluate(EvaluateRecipe(root=str(root)))
