"""Checkpoints: committed last, read again, damaged ones passed over, the oldest removed; on disk and on S3."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from emu_ray.errors import CheckpointError, StationError
from emu_ray.training.checkpoints import MARKER, Checkpoints, _ArrowFiles, _Reader, crc32
from tests.s3_server import S3Server


def _state(value: float) -> dict[str, Tensor]:
    return {
        "network.weight": torch.full((3, 2), value),
        "network.bias": torch.full((2,), value),
        "adamw.step": torch.tensor(value),
    }


def _save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(_state(float(step)), step, {"step": step})
    checkpoints.wait()


def _load(checkpoints: Checkpoints) -> tuple[dict[str, Tensor], dict | None]:
    state = _state(-1.0)
    return state, checkpoints.load(state, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_the_newest_is_read_and_two_are_kept(folder: Path) -> None:
    _save(Checkpoints(folder), 5, 10, 15)
    state, progress = _load(Checkpoints(folder))
    assert progress == {"step": 15}
    assert all((value == 15).all() for value in state.values())
    assert sorted(path.name[:13] for path in folder.iterdir()) == ["step-00000010", "step-00000015"]


def test_where_none_was_saved_nothing_is_read(folder: Path) -> None:
    state, progress = _load(Checkpoints(folder))
    assert progress is None
    assert all((value == -1).all() for value in state.values())


def test_on_s3_it_is_the_same(s3: S3Server) -> None:
    uri = f"s3://{s3.bucket}/run/checkpoints"
    _save(Checkpoints(uri), 5, 10, 15)
    state, progress = _load(Checkpoints(uri))
    assert progress == {"step": 15}
    assert all((value == 15).all() for value in state.values())
    assert len({name.split("/")[0] for name in Checkpoints(uri).store.sizes()}) == 2


class Counted:
    """The one method of a pyarrow file system that reading takes, on local files; each read is counted: on S3 it would be a request."""

    def __init__(self) -> None:
        self.reads = 0

    def open_input_file(self, path: str) -> Any:
        counted = self

        class File(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                counted.reads += 1
                return super().read(-1 if size is None else size)

            def readinto(self, into: Any) -> int | None:
                counted.reads += 1
                return super().readinto(into)

        return File(path)


def test_reading_many_tensors_takes_few_requests(folder: Path) -> None:
    saved = {f"network.{i}": torch.full((8, 8), float(i)) for i in range(200)}
    checkpoints = Checkpoints(folder)
    checkpoints.save(saved, 1, {})
    checkpoints.wait()
    found, counted = {name: torch.zeros(8, 8) for name in saved}, Counted()
    reader = _Reader(str(_newest(folder)))
    reader.fs = _ArrowFiles(counted)  # type: ignore[arg-type]
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert 0 < counted.reads < 20


def _newest(folder: Path) -> Path:
    return sorted(folder.iterdir())[-1]


def test_one_that_was_not_committed_is_not_read_and_later_removed(folder: Path) -> None:
    _save(Checkpoints(folder), 5, 10)
    (_newest(folder) / MARKER).unlink()
    assert _load(Checkpoints(folder))[1] == {"step": 5}
    _save(Checkpoints(folder), 11, 12)
    assert sorted(path.name[:13] for path in folder.iterdir()) == ["step-00000011", "step-00000012"]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "no metadata", "marker"])
def test_a_damaged_one_is_named_and_the_one_before_it_read(
    folder: Path, harm: str, capsys: pytest.CaptureFixture
) -> None:
    _save(Checkpoints(folder), 5, 10)
    shard = next(_newest(folder).glob("*.distcp"))
    content = shard.read_bytes()
    if harm == "cut":
        shard.write_bytes(content[:-100])
    elif harm == "changed":
        shard.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    elif harm == "missing":
        shard.unlink()
    elif harm == "no metadata":
        (_newest(folder) / ".metadata").unlink()
    else:
        (_newest(folder) / MARKER).write_text("{")
    state, progress = _load(Checkpoints(folder))
    assert progress == {"step": 5}
    assert all((value == 5).all() for value in state.values())
    said = capsys.readouterr().out
    assert "step-00000010" in said
    assert "passed over" in said if harm == "marker" else "is damaged" in said


def test_when_all_are_damaged_it_is_an_error_and_nothing_is_removed(folder: Path) -> None:
    _save(Checkpoints(folder), 5, 10)
    for shard in folder.rglob("*.distcp"):
        shard.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged \(step-00000010.*step-00000005"):
        _load(Checkpoints(folder))
    assert len(list(folder.iterdir())) == 2


def test_a_marker_that_lies_about_its_tensors_is_damage(folder: Path) -> None:
    """A shard that torch can't read although size and sum are right, such as one written by another version."""
    _save(Checkpoints(folder), 5, 10)
    shard = next(_newest(folder).glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    marker = json.loads((_newest(folder) / MARKER).read_text())
    marker["files"][shard.name] = [shard.stat().st_size, crc32(shard)]
    (_newest(folder) / MARKER).write_text(json.dumps(marker))
    assert _load(Checkpoints(folder))[1] == {"step": 5}


def test_another_networks_is_an_error_that_names_the_first_difference(folder: Path) -> None:
    _save(Checkpoints(folder), 5)
    state = _state(0.0) | {"network.weight": torch.zeros(3, 4)}
    with pytest.raises(CheckpointError, match=r"expected weight of shape \[3, 4\], found \[3, 2\]"):
        Checkpoints(folder).load(state, {})
    with pytest.raises(CheckpointError, match=r"expected extra of shape \[1\], found none"):
        Checkpoints(folder).load(_state(0.0) | {"network.extra": torch.zeros(1)}, {})


def test_what_was_not_saved_is_left_alone_where_it_is_optional(folder: Path) -> None:
    _save(Checkpoints(folder), 5)
    best = {"best.weight": torch.full((2,), 7.0)}
    assert Checkpoints(folder).load(_state(0.0), best) == {"step": 5}
    assert best["best.weight"].tolist() == [7.0, 7.0]


def test_the_state_may_change_as_soon_as_it_was_copied(folder: Path) -> None:
    checkpoints, state = Checkpoints(folder), {"network.weight": torch.zeros(2_000_000)}
    checkpoints.save(state, 1, {"step": 1})
    checkpoints.wait_until_copied()
    state["network.weight"].fill_(9.0)
    checkpoints.wait()
    read = {"network.weight": torch.ones(2_000_000)}
    Checkpoints(folder).load(read, {})
    assert (read["network.weight"] == 0).all()


def test_a_write_that_fails_is_told_at_the_next_and_earlier_ones_stay(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    _save(checkpoints, 5)
    (folder / "step-00000006").write_text("a file in the way")
    checkpoints._agreed = lambda value: "step-00000006/x" if isinstance(value, str) else value  # type: ignore[method-assign]
    checkpoints.save(_state(6.0), 6, {"step": 6})
    with pytest.raises(StationError, match="cannot write the checkpoint .*step-00000006/x"):
        checkpoints.save(_state(7.0), 7, {"step": 7})
    assert _load(Checkpoints(folder))[1] == {"step": 5}


def test_writing_goes_on_while_training_does(folder: Path) -> None:
    """`save` returns before the write: the thread that writes is another one."""
    checkpoints, writers = Checkpoints(folder), []
    write = checkpoints._write

    def watched(*arguments: object) -> None:
        writers.append(threading.current_thread())
        write(*arguments)  # type: ignore[arg-type]

    checkpoints._write = watched  # type: ignore[method-assign]
    _save(checkpoints, 1)
    assert writers[0] is not threading.current_thread()
