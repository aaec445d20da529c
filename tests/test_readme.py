"""Every command in the README, the how-to of the cluster and the jobs' docstrings is one that the jobs accept."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from emu_ray.config import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "jobs").glob("*.py"))]
COMMAND = re.compile(r"python -m jobs\.(\w+)([^#;\n`|(]*)")


def commands() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            said = line.startswith("command") or page.suffix == ".md"
            for job, arguments in COMMAND.findall(line) if said else []:
                if job != "NAME" and "--help" not in arguments:
                    found.append((str(page.relative_to(ROOT)), job, arguments.strip()))
    return found


def test_there_are_commands_to_try() -> None:
    assert len(commands()) > 15


@pytest.mark.parametrize(("page", "job", "arguments"), commands())
def test_a_written_command_is_accepted(page: str, job: str, arguments: str) -> None:
    module = importlib.import_module(f"jobs.{job}")
    words = shlex.split(arguments)
    if job == "make_base" and not words:
        return
    recipe = parse(job, module.__doc__ or "", module.RECIPES, words)
    assert type(recipe) in {type(r) for r in module.RECIPES.values()}


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_a_make_target_of_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(
        r"`((?:emu_ray|jobs|serve|cluster)/[\w/]+\.\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name
