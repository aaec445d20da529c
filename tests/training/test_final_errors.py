"""Errors that no further attempt would mend: noted for the next attempt where other workers may wait, returned at once where none does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emu_ray import errors
from emu_ray.config import to_json
from emu_ray.errors import InputError, StationError
from emu_ray.training import on_ray
from emu_ray.training.loop import LoopRecipe


class Fake:
    """A worker of the second rank of so many, without a Ray."""

    rank, world_size = 1, 2

    def __init__(self, storage: str, driver: str, is_live: bool = False) -> None:
        pass

    def require_owned(self) -> None:
        """Is."""


class Alone(Fake):
    rank, world_size = 0, 1


def raises(recipe: LoopRecipe, worker: Any, folder: Path) -> dict[str, Any]:
    """The error that `mode` names."""
    raise getattr(errors, MODE["error"])("row 7 is odd")


MODE = {"error": ""}


def _config(folder: Path, driver: str = "one") -> dict[str, Any]:
    return {
        "work": f"{__name__}:raises", "recipe_json": to_json(LoopRecipe(steps=1)), "recipe_class": "emu_ray.training.loop:LoopRecipe",
        "target": str(folder / "target"), "threads": 1, "storage": str(folder), "driver": driver, "is_live": False,
    }  # fmt: skip


def test_one_worker_s_error_is_raised_noted_and_returned_by_the_next_attempt_of_the_same_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "RayWorker", Fake)
    monkeypatch.setitem(MODE, "error", "InputError")
    monkeypatch.setattr(on_ray, "resolve_name", lambda name: raises if name.endswith(":raises") else LoopRecipe)
    with pytest.raises(InputError):
        on_ray._on_worker(_config(tmp_path))
    assert json.loads((tmp_path / on_ray.NOTE).read_text()) == ["one", "InputError", "row 7 is odd"]
    found = on_ray._on_worker(_config(tmp_path))
    assert isinstance(found, InputError) and str(found) == "row 7 is odd"
    with pytest.raises(InputError):  # another command tries for itself
        on_ray._on_worker(_config(tmp_path, driver="two"))


@pytest.mark.parametrize(
    ("worker", "error", "is_returned"),
    [(Alone, "InputError", True), (Fake, "DivergedError", True), (Fake, "NumericsError", False)],
)
def test_it_is_returned_at_once_where_no_other_worker_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: type, error: str, is_returned: bool
) -> None:
    monkeypatch.setattr(on_ray, "RayWorker", worker)
    monkeypatch.setitem(MODE, "error", error)
    monkeypatch.setattr(on_ray, "resolve_name", lambda name: raises if name.endswith(":raises") else LoopRecipe)
    if is_returned:
        assert type(on_ray._on_worker(_config(tmp_path))) is getattr(errors, error)
        assert not (tmp_path / on_ray.NOTE).exists()
    else:
        with pytest.raises(getattr(errors, error)):
            on_ray._on_worker(_config(tmp_path))
        assert (tmp_path / on_ray.NOTE).exists()


def test_what_another_attempt_may_mend_is_raised_and_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "RayWorker", Fake)
    monkeypatch.setitem(MODE, "error", "StationError")
    monkeypatch.setattr(on_ray, "resolve_name", lambda name: raises if name.endswith(":raises") else LoopRecipe)
    with pytest.raises(StationError):
        on_ray._on_worker(_config(tmp_path))
    assert not (tmp_path / on_ray.NOTE).exists()
