"""score, select and choose as commands: exit codes and sentences."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from emu_ray.config import fingerprint, from_json, to_json

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = ("score", "select", "choose")


@pytest.mark.parametrize("job", JOBS)
def test_every_recipe_survives_json(job: str) -> None:
    recipes = importlib.import_module(f"jobs.{job}").RECIPES
    assert {"demo", "stamps", "real"} <= set(recipes)
    for recipe in recipes.values():
        again = from_json(type(recipe), to_json(recipe))
        assert again == recipe and fingerprint(again) == fingerprint(recipe)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("select", "domo"), "unknown recipe 'domo'"),
        (("select", "demo", "--policy.min-beauty", "3"), "unknown field '--policy.min-beauty'"),
        (("select", "demo", "--root", "ROOT"), "scores doesn't exist: run `python -m jobs.score` first"),
        (
            ("choose", "demo", "--root", "ROOT"),
            "pool doesn't exist: run `python -m jobs.ingest` or `python -m jobs.fetch` first",
        ),
    ],
)
def test_a_mistake_exits_with_2_and_one_sentence(argv: tuple[str, ...], said: str, tmp_path: Path) -> None:
    whole = [sys.executable, "-m", f"jobs.{argv[0]}", *(str(tmp_path) if a == "ROOT" else a for a in argv[1:])]
    ended = subprocess.run(whole, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and said in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("job", ["select", "choose"])  # score alone loads torch, easyocr and Ray for it
def test_help_lists_the_fields(job: str) -> None:
    whole = [sys.executable, "-m", f"jobs.{job}", "demo", "--help"]
    ended = subprocess.run(whole, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "--root" in ended.stdout
