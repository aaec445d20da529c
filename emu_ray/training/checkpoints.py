"""Checkpoints of a run in progress: sharded, written while training goes on, and read again on any number of workers.

Each lies in a folder of its own, `step-00000500-3f2a91c0`: shards by `torch.distributed.checkpoint`, then `committed.json`, written last,
which lists the files with their sizes and sums. A folder without it is never read. Two committed ones are kept, so that one that is
found damaged costs one interval and not the run.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pyarrow import fs
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import StateDictStager

from emu_ray.errors import CheckpointError, EmuRayError, StationConflictError, StationError, first_line
from emu_ray.stations import Store
from emu_ray.training.ownership import FILE as OWNER
from emu_ray.training.ownership import Ownership

MARKER = "committed.json"
READ_BYTES = 4 << 20  # of a checkpoint on S3 at a time; larger tensors are read at once
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Committed:
    """A checkpoint that may be read: its folder, its step, and what was written beside the tensors."""

    folder: str
    step: int
    progress: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, list[int]]  # name -> [bytes, crc32]


class Checkpoints:
    """The checkpoints below one folder or s3:// address. All ranks call each method; with more than one, a process group must be there."""

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        keep: int = 2,
        ownership: Ownership | None = None,
    ) -> None:
        """With an `ownership`, reading takes it, and nothing is committed or removed once it is lost."""
        self.store, self.rank, self.world_size, self.keep = Store(uri), rank, world_size, keep
        self.ownership = ownership
        # of its own: the writing thread's exchanges must not meet those of the step
        self.group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self.thread = ThreadPoolExecutor(1, "checkpoint", *_on_this_gpu())
        self.stager = StateDictStager(pin_memory=torch.cuda.is_available(), share_memory=False)
        self.writing: Future[None] | None = None
        self.copied = threading.Event()

    def save(self, state: Tensors, step: int, progress: dict[str, Any]) -> None:
        """Starts to write `state` (tensors or this rank's shards) and returns; an earlier write is waited for, and its error raised.

        The tensors may be read but not changed until `wait_until_copied` has returned. `progress` goes to JSON.
        """
        self.wait()
        self.copied.clear()
        self.writing = self.thread.submit(self._write, state, step, json.dumps(progress))

    def wait_until_copied(self) -> None:
        """Returns when the state that is being saved may change."""
        if self.writing is not None:
            self.copied.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is committed; raises what prevented it."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        self.wait()
        self.thread.shutdown()

    def _write(self, state: Tensors, step: int, progress: str) -> None:
        try:
            copied = self.stager.stage(state)
        finally:
            self.copied.set()
        name = self._agreed(f"step-{step:08d}-{os.urandom(4).hex()}" if self.rank == 0 else None)
        with self._folder(name) as folder:
            try:
                dcp.save(
                    copied,
                    storage_writer=FileSystemWriter(folder),
                    process_group=self.group,
                    no_dist=self.world_size == 1,
                )
            except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
                raise StationError(
                    f"cannot write the checkpoint {self.store.path(name)}: {reason_of(error)}"
                ) from error
            mine = self._upload(folder, name)
        files = self._all_files(mine)
        if lost := self._agreed(self._unseen(name, files) if self.rank == 0 else None):
            raise StationError(
                f"{self.store.path(name)}: the first worker doesn't see {lost}, which another one wrote: the machines share no disk there; "
                "give --root a shared folder or an s3:// address"
            )
        self.require_owned()
        if self.rank == 0:
            shapes = {key: list(value.shape) for key, value in state.items() if key.startswith("network.")}
            marker = {"step": step, "progress": json.loads(progress), "shapes": shapes, "files": files}
            self.store.put(f"{name}/{MARKER}", json.dumps(marker).encode())
            self._prune()
        self._agreed(None)  # no rank goes on before the commit

    def require_owned(self) -> None:
        """StationConflictError, on all ranks, when the same run was started again elsewhere."""
        if self.ownership is not None and self._agreed(self.rank == 0 and self.ownership.is_lost()):
            raise StationConflictError(self.ownership.loss)

    @contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        """Where torch writes: the place itself, or a local folder for what is uploaded afterwards."""
        if self.store.is_local:
            yield Path(self.store.path(name))
        else:
            with tempfile.TemporaryDirectory(prefix="emu_ray-") as here:
                yield Path(here)

    def _upload(self, folder: Path, name: str) -> dict[str, list[int]]:
        """This rank's files with their sizes and sums; on S3 they are put there."""
        mine: dict[str, list[int]] = {}
        for path in sorted(folder.iterdir()):
            if path.name.startswith(f"__{self.rank}_") or (path.name == ".metadata" and self.rank == 0):
                mine[path.name] = [path.stat().st_size, crc32(path)]
                if not self.store.is_local:
                    self.store.put(f"{name}/{path.name}", path)
        return mine

    def _unseen(self, name: str, files: dict[str, list[int]]) -> str | None:
        """A file that isn't where this worker looks."""
        if not self.store.is_local:
            return None
        return next((file for file in files if not Path(self.store.path(f"{name}/{file}")).exists()), None)

    def _all_files(self, mine: dict[str, list[int]]) -> dict[str, list[int]]:
        if self.group is None:
            return mine
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, mine, group=self.group)
        return {name: facts for files in every for name, facts in files.items()}

    def _agreed(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.group is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def _prune(self) -> None:
        """Removes committed checkpoints beyond the newest `keep`, and what killed writers left."""
        names = self.store.sizes()
        committed = sorted({n.split("/")[0] for n in names if n.endswith(f"/{MARKER}")})
        kept = {*committed[-self.keep :], OWNER}
        for name in sorted(
            names, key=lambda n: not n.endswith(MARKER)
        ):  # markers first: what is half removed is never read
            if name.split("/")[0] not in kept:
                self.store.delete(name)
        if self.store.is_local:
            for folder in Path(self.store.uri).glob("step-*"):
                if folder.name not in kept and not any(folder.iterdir()):
                    folder.rmdir()

    def committed(self) -> list[Committed]:
        """What may be read, newest first; a marker that can't be read is passed over with a line."""
        found = []
        for name in sorted((n for n in self.store.sizes() if n.endswith(f"/{MARKER}")), reverse=True):
            try:
                marker = json.loads(self.store.get(name) or b"")
                found.append(Committed(folder=name.split("/")[0], **marker))
            except (ValueError, TypeError):
                print(f"checkpoint {self.store.path(name)} can't be read: it is passed over", flush=True)
        return found

    def load(self, state: Tensors, optional: Tensors) -> dict[str, Any] | None:
        """Fills the tensors of `state` in place from the newest sound checkpoint; its `progress`, or None when there is none.

        A damaged one is named and the one before it taken. `optional` tensors are filled if they were saved. Raises CheckpointError for
        another network's checkpoint, and when every committed one is damaged; StationConflictError for a driver that is no longer the owner.
        """
        self._take_ownership()
        candidates: list[Committed] = self._agreed(self.committed() if self.rank == 0 else None)
        damages = []
        for candidate in candidates:
            self._require_same_network(candidate, state)
            damage = self._agreed(self._damage(candidate) if self.rank == 0 else None)
            if damage is None:
                damage = self._read(candidate, state, optional)
            if damage is None:
                return candidate.progress
            damages.append(f"{candidate.folder}: {damage}")
            if self.rank == 0:
                print(
                    f"checkpoint {self.store.path(candidate.folder)} is damaged ({damage}): going back to the one before it",
                    flush=True,
                )
        if damages:
            raise CheckpointError(
                f"every checkpoint at {self.store.uri} is damaged ({'; '.join(damages)}): restore the files, or remove the folder to begin anew"
            )
        return None

    def _take_ownership(self) -> None:
        if self.ownership is None:
            return
        error: StationConflictError | None = None
        if self.rank == 0:
            try:
                self.ownership.take()
            except StationConflictError as found:
                error = found
        if error := self._agreed(error):
            raise error

    def _require_same_network(self, candidate: Committed, state: Tensors) -> None:
        expected = {name: list(value.shape) for name, value in state.items() if name.startswith("network.")}
        if expected == candidate.shapes:
            return
        name = next(
            n for n in sorted(expected.keys() | candidate.shapes.keys()) if expected.get(n) != candidate.shapes.get(n)
        )
        raise CheckpointError(
            f"the checkpoint {self.store.path(candidate.folder)} is another network's: expected {name.removeprefix('network.')} of shape "
            f"{expected.get(name, 'none')}, found {candidate.shapes.get(name, 'none')}; remove the folder to begin anew, or ask for the network it was made with"
        )

    def _damage(self, candidate: Committed) -> str | None:
        """What is wrong with the files; on S3 their sizes alone, since it keeps its own sums."""
        sizes = Store(self.store.path(candidate.folder)).sizes()
        for name, (size, sum_) in candidate.files.items():
            if sizes.get(name) != size:
                return f"{name} should have {size} bytes, and {'is missing' if name not in sizes else f'has {sizes[name]}'}"
            if self.store.is_local and crc32(Path(self.store.path(f"{candidate.folder}/{name}"))) != sum_:
                return f"{name} was changed since it was written"
        return None

    def _read(self, candidate: Committed, state: Tensors, optional: Tensors) -> str | None:
        reader = _Reader(self.store.path(candidate.folder))
        damage = None
        try:
            saved = reader.read_metadata().state_dict_metadata
            wanted = state | {name: value for name, value in optional.items() if name in saved}
            dcp.load(wanted, storage_reader=reader, process_group=self.group, no_dist=self.world_size == 1)
        except EmuRayError:
            raise
        except (Exception, dcp.api.CheckpointException) as error:  # anything; and the latter is a BaseException
            damage = reason_of(error)
        if self.group is None:
            return damage
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, damage, group=self.group)
        return next((found for found in every if found), None)


def _on_this_gpu() -> tuple[Any, ...]:
    """What makes a new thread work on the GPU that this one works on, and not on the first."""
    return (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else ()


def crc32(path: Path) -> int:
    """The sum of a file's bytes."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(8 << 20):
            total = zlib.crc32(chunk, total)
    return total


def reason_of(error: BaseException) -> str:
    """One line: torch wraps the errors of all ranks in one exception, whose first line says nothing."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return first_line(error)


class _Reader(FileSystemReader):
    """torch's reader; on S3 it reads through pyarrow."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        if uri.startswith("s3://"):
            system, base = Store(uri).filesystem()
            self.fs, self.path = _ArrowFiles(system), Path(base)


class _ArrowFiles(FileSystem):
    """Files of a pyarrow file system, for reading."""

    def __init__(self, system: fs.FileSystem) -> None:
        self.system = system

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "rb"
        with self.system.open_input_file(os.fspath(path)) as stream:
            # unpickling reads a few bytes at a time, and each would be a request
            yield io.BufferedReader(stream, READ_BYTES)  # type: ignore[arg-type]

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return bool(self.system.get_file_info(os.fspath(path)).type != fs.FileType.NotFound)
