"""What the whole way is made of: steps in order, which of them are finished, and what they cost. No Ray and no argv here.

A step is one command of `jobs`. It is skipped when a record of it says the same arguments, and the stations it wrote are still those it
wrote, and every step before it was skipped too: the second run of a finished way starts nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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

    def command(self, root: str) -> list[str]:
        """The module's arguments."""
        return ["-m", f"jobs.{self.job}", *self.arguments, "--root", root]


@dataclass
class Record:
    """What earlier runs finished: per step its arguments, seconds and the fingerprints of its stations."""

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

    def is_finished(self, step: Step, base: str) -> bool:
        """Whether the step ran with these arguments on this base, and what it wrote is still there."""
        known = self.steps.get(step.title)
        return (
            known is not None
            and known["arguments"] == list(step.arguments)
            and known["base"] == base
            and known["wrote"] == self._wrote(step)
        )

    def finished(self, step: Step, base: str, seconds: float) -> None:
        """Notes a finished step."""
        self.steps[step.title] = {
            "arguments": list(step.arguments), "base": base, "seconds": round(seconds, 1), "wrote": self._wrote(step),
        }  # fmt: skip
        self.write()

    def _wrote(self, step: Step) -> dict[str, str]:
        manifests = {name: Station(f"{self.root}/{name}").manifest() for name in step.writes}
        return {name: f"{m.fingerprint} {m.finished_at}" for name, m in manifests.items() if m is not None}


def run_steps(
    steps: list[Step], record: Record, base: str, run: Callable[[Step], None], say: Callable[[str], None] = print
) -> int:
    """Runs what is missing, in order, and returns how many steps ran; `run` raises when a step fails."""
    base_mark, ran = content_fingerprint(base), 0
    for number, step in enumerate(steps, 1):
        if ran == 0 and record.is_finished(step, base_mark):
            say(f"[{number}/{len(steps)}] {step.title}: finished before")
            continue
        say(f"[{number}/{len(steps)}] {step.title}")
        started = time.monotonic()
        run(step)
        ran += 1
        record.finished(step, base_mark, time.monotonic() - started)
        say(f"[{number}/{len(steps)}] {step.title}: {time.monotonic() - started:.0f} s")
    return ran


class MemoryWatch:
    """Samples the resident memory of this process and all below it, once a second; `peak_gb` counts shared pages once."""

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
