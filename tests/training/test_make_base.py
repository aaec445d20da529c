"""The base's own making: every job below one root, parts whole or not at all, a finished base left alone."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest
import torch

from emu_ray.base import text
from emu_ray.base.written_whole import written_whole
from emu_ray.config import parse
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.stations.folders import content_fingerprint
from jobs import make_base
from jobs.make_base import BaseRecipe, finish, jobs_after_vae, jobs_before_vae


def test_every_job_reads_and_writes_below_the_root(tmp_path: Path) -> None:
    places = []
    for job, *arguments in jobs_before_vae(tmp_path) + jobs_after_vae(tmp_path):
        recipe = parse(job, "", importlib.import_module(f"jobs.{job}").RECIPES, arguments)
        places += [recipe.root, getattr(recipe, "autoencoder", None), getattr(_training(recipe), "start", None)]
    given = [place for place in places if place is not None]
    assert len(given) == 10 + 2 + 3
    assert all(place.startswith(f"{tmp_path}/") for place in given)


def _training(recipe: object) -> object:
    return getattr(recipe, "training", None)


def test_the_jobs_follow_one_another_as_the_recipes_name_their_starts(tmp_path: Path) -> None:
    said = {tuple(arguments[:2]): arguments[2:] for arguments in jobs_before_vae(tmp_path) + jobs_after_vae(tmp_path)}
    for (job, name), flags in said.items():
        default = importlib.import_module(f"jobs.{job}").RECIPES[name]
        start = getattr(_training(default), "start", None)
        assert flags[1] == default.root.replace("runs/base", str(tmp_path))
        assert start is None or flags[3] == start.replace("runs/base", str(tmp_path))


def test_what_is_written_whole_is_there_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "heads"
    with pytest.raises(KeyboardInterrupt):
        with written_whole(target) as half:
            half.mkdir()
            (half / "one").touch()
            raise KeyboardInterrupt
    assert not target.exists()
    for content in ("first", "second"):
        with written_whole(target) as half:
            half.mkdir()
            (half / content).touch()
        assert [path.name for path in target.iterdir()] == [content]
    assert [path.name for path in target.parent.iterdir()] == ["heads"]
    with written_whole(target / "second") as half:
        half.write_text("a file")
    assert (target / "second").read_text() == "a file"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP and T5 after a single step."""
    for name in ("CLIP_LOOP", "T5_LOOP"):
        loop = dataclasses.replace(getattr(text, name), steps=1, batch_size=4)
        monkeypatch.setattr(text, name, loop)
    monkeypatch.setattr(text, "CLIP_PAIRS", 8)
    monkeypatch.setattr(text, "T5_CAPTIONS", 32)


def test_encoders_killed_between_two_writes_are_completed(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, work = tmp_path / "parts", tmp_path / "work"

    def make() -> None:
        text.make_t5(parts, work, lambda _: None)
        text.make_clip(parts, work, lambda _: None)

    make()
    whole = content_fingerprint(str(parts))
    for last, rest in (("tokenizer_2", "text_encoder_2"), ("tokenizer", "text_encoder"), ("clip", None)):
        shutil.rmtree(parts / last)
        if rest is not None:
            (parts / rest / "config.json").unlink()  # as in a folder that was written in place
    make()
    assert content_fingerprint(str(parts)) == whole
    monkeypatch.setattr(text, "train", None)
    make()  # trains nothing


def test_the_finished_base_is_the_pipeline_in_half_precision_and_leaves_the_parts_alone(
    pipeline: EmuPipeline, checkpoint: Path, tmp_path: Path
) -> None:
    parts, weights = tmp_path / "parts", tmp_path / "weights"
    shutil.copytree(checkpoint, parts, ignore=shutil.ignore_patterns("unet", "model_index.json", "pipeline.py"))
    (parts / "clip").mkdir()
    (parts / "clip" / "emu-demo.json").write_text("{}")
    before = content_fingerprint(str(parts))
    finish(checkpoint, parts, weights)
    assert content_fingerprint(str(parts)) == before
    assert (weights / "clip" / "emu-demo.json").exists()
    made = EmuPipeline.load(weights)
    ours = pipeline.unet.state_dict()
    assert all(torch.equal(v, ours[k].half().float()) for k, v in made.unet.state_dict().items())
    assert (weights / "vae" / "config.json").read_bytes() == (parts / "vae" / "config.json").read_bytes()


def test_a_finished_base_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights" / "unet").mkdir(parents=True)
    monkeypatch.setattr(make_base, "make_small_parts", None)
    make_base.run(BaseRecipe(root=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
