"""What the whole way is made of: steps in order, which of them are finished, and what they cost. No Ray and no argv here.

A step is one command of `jobs`. It is skipped when the record knows it with the same arguments, base and code, and its stations and those
of all steps before it are still those of that time: the second run of a finished way starts nothing. Anything else is for the job itself
to judge, by the fingerprints of its recipe and inputs.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from emu_ray.stations import Station
from emu_ray.stations.folders import content_fingerprint

RECORD = "whole_way.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """`python -m jobs.JOB ARGUMENTS --root ROOT`, and the stations it writes below the root."""

    job: str
    arguments: tuple[str, ...]
    writes: tuple[str, ...]
    name: str = ""

    @property
    def title(self) -> str:
        """How the step is called in the log and in `seconds`."""
        return self.name or self.job

    @property
    def reads_outside(self) -> bool:
        """Whether it reads files of the user, which may have changed: only the job can tell."""
        return "--source" in self.arguments

    def command(self, root: str) -> list[str]:
        """The module's arguments."""
        return ["-m", f"jobs.{self.job}", *self.arguments, "--root", root]


@dataclass
class Record:
    """What earlier runs finished: per step its arguments, base, code, seconds and the stations it found and wrote."""

    root: str
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    peak_rss_gb: float = 0.0

    @classmethod
    def read(cls, root: str) -> Record:
        """The record below `root`; an empty one when there is none."""
        content = Station(root).store.get(RECORD)
        found = json.loads(content) if content else {}
        return cls(root, found.get("steps", {}), found.get("peak_rss_gb", 0.0))

    def write(self) -> None:
        """Replaces the record below the root."""
        content = json.dumps({"steps": self.steps, "peak_rss_gb": round(self.peak_rss_gb, 2)}, indent=2)
        Station(self.root).put_file(RECORD, content.encode())

    def is_finished(self, step: Step, mark: dict[str, str]) -> bool:
        """Whether the step ran with these arguments under this `mark`, and what it wrote is still there."""
        known = self.steps.get(step.title, {})
        same = all(known.get(name) == value for name, value in self._identity(step, mark).items())
        return same and known.get("wrote") == self.wrote(step) and not step.reads_outside

    def finished(self, step: Step, mark: dict[str, str], seconds: float) -> None:
        """Notes a finished step; one that had nothing to do keeps the seconds of the time when it had."""
        known, wrote = self.steps.get(step.title, {}), self.wrote(step)
        seconds = known["seconds"] if known.get("wrote") == wrote else round(seconds, 1)
        self.steps[step.title] = {**self._identity(step, mark), "seconds": seconds, "wrote": wrote}
        self.write()

    def _identity(self, step: Step, mark: dict[str, str]) -> dict[str, Any]:
        return {"arguments": list(step.arguments), **mark}

    def wrote(self, step: Step) -> dict[str, str]:
        """The step's stations as they lie there now, each by its fingerprint and the moment it was finished."""
        manifests = {name: Station(f"{self.root}/{name}").manifest() for name in step.writes}
        return {name: f"{m.fingerprint} {m.finished_at}" for name, m in manifests.items() if m is not None}


def run_steps(
    steps: list[Step], record: Record, base: str, run: Callable[[Step], None], say: Callable[[str], None] = print
) -> int:
    """Runs what is missing, in order, and returns how many steps ran; `run` raises when a step fails."""
    mark, ran = {"base": content_fingerprint(base), "code": code_fingerprint()}, 0
    found: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        mark = {**mark, "before": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]}
        if record.is_finished(step, mark):
            found |= record.wrote(step)
            say(f"[{number}/{len(steps)}] {step.title}: finished before")
            continue
        say(f"[{number}/{len(steps)}] {step.title}")
        started = time.monotonic()
        run(step)
        ran += 1
        record.finished(step, mark, time.monotonic() - started)
        found |= record.wrote(step)
        say(f"[{number}/{len(steps)}] {step.title}: {time.monotonic() - started:.0f} s")
    return ran


def code_fingerprint() -> str:
    """16 hex digits of the project's own code: when it changed, each job judges for itself what is still right."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted([*package.rglob("*.py"), *(package.parent / "jobs").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class MemoryWatch:
    """Samples the resident memory of this process and all below it, once a second.

    `peak_gb` adds what each process has alone; of shared pages it counts the largest process's, since most are the same ones.
    """

    def __init__(self) -> None:
        self.peak_gb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(1.0):
            total, shared = 0, 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                except psutil.Error:
                    continue  # it ended between the listing and the look
                total += memory.rss - memory.shared
                shared = max(shared, memory.shared)
            self.peak_gb = max(self.peak_gb, (total + shared) / 1e9)
