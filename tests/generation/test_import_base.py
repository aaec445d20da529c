"""A published base becomes the station ROOT/start: from a folder, or by name from a hub's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu_ray.errors import InputError, StationConflictError
from emu_ray.generation import Generator, SamplingSettings
from emu_ray.stations import Station
from jobs.import_base import ImportRecipe, run
from tests.generation.small_bases import edit_json, sd15, sdxl

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_files_that_are_read_are_taken_and_no_others(tmp_path: Path) -> None:
    source = sd15(tmp_path / "sd15")
    for name in (
        "README.md",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "flax/x.json",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not read")
    run(ImportRecipe(root=str(tmp_path), source=str(source)))
    manifest = Station(tmp_path / "start").require("start")
    assert {name.split("/")[0] for name in manifest.files} == {
        "model_index.json", "feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    }  # fmt: skip
    assert {n for n in manifest.files if n.startswith("unet/")} == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert Generator(tmp_path / "start").generate(["a"], [1], SamplingSettings(steps=1)).shape == (1, 64, 64, 3)
    run(ImportRecipe(root=str(tmp_path), source=str(source)))  # finished before: nothing to do
    edit_json(source / "unet" / "config.json", note="another content at the same place")
    with pytest.raises(StationConflictError):
        run(ImportRecipe(root=str(tmp_path), source=str(source)))


def test_a_source_that_is_no_base_is_refused_and_another_may_follow(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "sdxl")
    index = (source / "model_index.json").read_bytes()
    (source / "model_index.json").unlink()
    with pytest.raises(InputError, match="no model_index.json"):
        run(ImportRecipe(root=str(tmp_path), source=str(source)))
    other = tmp_path / "other"
    source.rename(other)
    (other / "model_index.json").write_bytes(index)
    run(ImportRecipe(root=str(tmp_path), source=str(other)))
    Station(tmp_path / "start").require("start")


def _job(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jobs.import_base", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_hubs_name_is_taken_from_what_the_hub_gives_and_an_unknown_one_is_one_sentence(tmp_path: Path) -> None:
    held = tmp_path / "cache" / "models--tiny--sd15"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("0123abc")
    (held / "snapshots").mkdir()
    sd15(tmp_path / "sd15").rename(held / "snapshots" / "0123abc")
    done = _job(tmp_path / "cache", "sd15", "--root", str(tmp_path / "run"), "--source", "tiny/sd15")
    assert done.returncode == 0, done.stderr[-2000:]
    Station(tmp_path / "run" / "start").require("start")
    failed = _job(tmp_path / "cache", "sd15", "--root", str(tmp_path / "other"), "--source", "tiny/none")
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith("error: tiny/none is neither a folder here nor a model")
