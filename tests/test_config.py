"""Recipes on the command line, as JSON and as a fingerprint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from emu_ray.config import SUBMITTED_JOB_VARIABLE, absolute, command_line, fingerprint, from_json, parse, to_json
from emu_ray.errors import InputError, RecipeError
from emu_ray.stations import Station


@dataclass(frozen=True, kw_only=True)
class Bounds:
    min_side_px: int = 64
    max_text_area: float = 0.05


@dataclass(frozen=True, kw_only=True)
class SmallRecipe:
    root: str = "runs/small"
    bounds: Bounds = Bounds()
    name: Literal["first", "second"] = "first"
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None
    workers: int = field(default=1, metadata={"affects_result": False})
    reads: type = Station


RECIPES = {"demo": SmallRecipe(root="/tmp/demo"), "other": SmallRecipe(root="s3://bucket/other", limit=3)}


def run(argv: Sequence[str], seen: list[SmallRecipe] | None = None) -> None:
    command_line("small", "Does little.", RECIPES, (seen if seen is not None else []).append, argv)


def test_overrides_reach_the_recipe_also_nested_ones() -> None:
    seen: list[SmallRecipe] = []
    run(["demo", "--bounds.min-side-px", "7", "--limit", "5", "--sizes", "3", "4", "5", "--name", "second"], seen)
    expected = dataclasses.replace(
        RECIPES["demo"], bounds=Bounds(min_side_px=7), limit=5, sizes=(3, 4, 5), name="second"
    )
    assert seen == [expected]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "one of demo, other"),
        (["dmeo"], "unknown recipe 'dmeo'"),
        (["demo", "--min-side", "3"], "unknown field '--min-side'"),
        (["demo", "--bounds.min-side-px", "many"], "many"),
        (["demo", "--name", "third"], "third"),
        (["demo", "--limit"], "--limit"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1


def test_an_error_of_the_job_is_a_sentence_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(recipe: SmallRecipe) -> None:
        raise InputError("a.tar is broken") if recipe.limit else ValueError("a bug")

    with pytest.raises(SystemExit) as stop:
        command_line("small", "", RECIPES, fail, ["other"])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a.tar is broken\n"
    with pytest.raises(ValueError, match="a bug"):
        command_line("small", "", RECIPES, fail, ["demo"])


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]])
def test_help_at_both_levels_exits_with_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(argv)
    assert not stop.value.code
    assert ("other" if len(argv) == 1 else "--bounds.min-side-px") in capsys.readouterr().out


def test_a_relative_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("small", "", RECIPES, ["demo", "--root", "runs/a"]).root == str(tmp_path / "runs/a")
    assert parse("small", "", RECIPES, ["other"]).root == "s3://bucket/other"


def test_a_relative_root_is_refused_inside_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBMITTED_JOB_VARIABLE, "{}")
    with pytest.raises(RecipeError, match="absolute path or an s3:// address"):
        parse("small", "", RECIPES, ["demo", "--root", "runs/a"])


def test_the_name_of_rays_variable_is_the_one_ray_uses() -> None:
    from ray._private.runtime_env import constants

    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == SUBMITTED_JOB_VARIABLE


def test_json_gives_the_same_recipe_again() -> None:
    recipe = SmallRecipe(bounds=Bounds(max_text_area=1e-3), sizes=(), limit=9, root="/x")
    assert from_json(SmallRecipe, to_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"colour": 1}, "unknown field 'colour'"),
        ({"limit": "nine"}, "limit"),
        ({"bounds": {"min_side_px": 1.5}}, r"bounds.min_side_px: expected int, found 1.5"),
        ({"name": "third"}, "name"),
        ({"reads": "os:system"}, "expected a class of emu_ray"),
    ],
)
def test_json_with_something_unknown_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        from_json(SmallRecipe, json.dumps({**json.loads(to_json(SmallRecipe())), **changed}))


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(RecipeError, match="not JSON"):
        from_json(SmallRecipe, "{")


def test_the_fingerprint_ignores_where_and_how_but_not_what() -> None:
    recipe = SmallRecipe()
    same = dataclasses.replace(recipe, root="/elsewhere", workers=64)
    other = dataclasses.replace(recipe, bounds=Bounds(min_side_px=65))
    assert fingerprint(recipe) == fingerprint(same) != fingerprint(other)
    assert len(fingerprint(recipe)) == 16


def test_an_empty_root_is_refused_and_not_taken_for_the_file_systems_root() -> None:
    with pytest.raises(RecipeError, match="--root is empty"):
        absolute("", "--root")
