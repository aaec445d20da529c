"""Holds the code against ARCHITECTURE.md: floors, doors for Ray, one owner a heavy package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "errors": 0,
    "config": 1,
    "error_watch": 1,
    "records": 1,
    "stations": 2,
    "diffusion": 2,
    "models": 2,
    "pictures": 2,
    "session": 2,
    "whole_way": 2,
    "ingest": 3,
    "haystack": 3,
    "curation": 3,
    "encoding": 3,
    "fetching": 4,
    "generation": 4,
    "training": 4,
    "evaluation": 5,
    "sweeps": 6,
    "base": 6,
}
OWNERS = {
    "easyocr": {"emu_ray/curation/ocr_scorer.py"},
    "open_clip": {"emu_ray/curation/clip_scorer.py", "emu_ray/models/small_clip.py", "emu_ray/base/text.py"},
    "boto3": {"emu_ray/stations/store.py"},
    "aiohttp": {"emu_ray/fetching/client.py"},
    "imagehash": {"emu_ray/curation/perceptual_hash.py"},
    "peft": {"emu_ray/training/lora.py"},
}
MODULES = sorted((ROOT / "emu_ray").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def room(path: Path) -> str:
    relative = path.relative_to(ROOT / "emu_ray")
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_its_own_or_lower_floors(path: Path) -> None:
    if room(path) == "__init__":
        return
    own = FLOORS[room(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "emu_ray" and len(parts) > 1 and parts[1] != room(path):
            assert FLOORS[parts[1]] <= own, f"{path.relative_to(ROOT)} on floor {own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_enters_only_by_its_doors(path: Path) -> None:
    is_door = path.name == "on_ray.py" or room(path) == "session"
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(path))
    assert is_door or not uses_ray


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_package_has_its_owner(package: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in MODULES if any(n.split(".")[0] == package for n in imports(p))}
    assert users <= OWNERS[package]
    assert users


def test_packages_for_jobs_and_serving_are_not_imported_from_below() -> None:
    for path in MODULES:
        assert not {n.split(".")[0] for n in imports(path)} & {"jobs", "serve"}, path


def test_each_room_stands_in_the_architecture() -> None:
    drawn = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in (ROOT / "emu_ray").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}`" in drawn
