"""A run that is started again while its old workers go on: the old ones commit and remove nothing any more."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emu_ray.errors import StationConflictError
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.ownership import Ownership


def _group(folder: Path, driver: str) -> Checkpoints:
    """A group of workers that has begun, as far as checkpoints go."""
    group = Checkpoints(folder, ownership=Ownership(folder, driver))
    group.load(_state(0), {})
    return group


def _state(value: float) -> dict[str, Tensor]:
    return {"network.weight": torch.full((2,), value)}


def _save(group: Checkpoints, step: int) -> None:
    group.save(_state(step), step, {"step": step})
    group.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("is_other_driver", [True, False])
def test_an_old_group_commits_nothing_once_a_new_one_has_begun(folder: Path, is_other_driver: bool) -> None:
    Ownership(folder, "first").begin()
    old = _group(folder, "first")
    _save(old, 5)
    driver = "second" if is_other_driver else "first"
    if is_other_driver:
        Ownership(folder, driver).begin()
    new = _group(folder, driver)
    unfinished = folder / "step-00000006-aaaaaaaa" / "__0_0.distcp"  # what the new group is writing
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half")
    with pytest.raises(StationConflictError, match="started again meanwhile.*nothing is lost"):
        _save(old, 10)
    with pytest.raises(StationConflictError):
        old.require_owned()
    assert unfinished.exists()
    new.require_owned()
    _save(new, 6)
    assert [found.step for found in new.committed()] == [6, 5]
    assert not unfinished.exists()  # of a killed writer, as far as the owner can know


def test_the_workers_of_a_driver_that_was_replaced_do_not_begin(folder: Path) -> None:
    Ownership(folder, "first").begin()
    Ownership(folder, "second").begin()
    with pytest.raises(StationConflictError):
        _group(folder, "first")
    _save(_group(folder, "second"), 5)


def test_a_folder_that_was_removed_is_nobody_s(folder: Path) -> None:
    Ownership(folder, "first").begin()
    group = _group(folder, "first")
    shutil.rmtree(folder)
    _save(group, 5)
    assert [found.step for found in group.committed()] == [5]
