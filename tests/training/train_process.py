"""Runs of training in a process of its own with a Ray of its own: what tests kill. And the work of its workers, which notes what each step
reads, and waits to be killed while a checkpoint is being written."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.denoiser_run import DenoiserRun, denoiser_work
from emu_ray.training.loop import _Run
from emu_ray.training.on_ray import RayWorker

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_NODE = """
ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=150_000_000, log_to_driver=False, **dashboard)
"""
NODES_OF_ONE_CPU = """
from ray.cluster_utils import Cluster
one = dict(num_cpus=1, num_gpus=0, object_store_memory=100_000_000)
workers = dashboard.pop("runtime_env")
cluster = Cluster(initialize_head=True, head_node_args=dict(**one, **dashboard))
nodes = [cluster.add_node(**one) for _ in range({count})]
ray.init(address=cluster.address, log_to_driver=False, runtime_env=workers)
print("ADDRESS", cluster.address, flush=True)
for node in nodes:
    print("NODE", node.node_id, node.all_processes["raylet"][0].process.pid, flush=True)
"""
# One node, and a second one once the file {grow} is there.
A_NODE_MORE = """
import subprocess, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
one = dict(num_cpus=1, num_gpus=0, object_store_memory=100_000_000)
workers = dashboard.pop("runtime_env")
cluster = Cluster(initialize_head=True, head_node_args=dict(**one, **dashboard))
ray.init(address=cluster.address, log_to_driver=False, runtime_env=workers)
def grow():
    while not Path({grow!r}).exists():
        time.sleep(0.1)
    ray_command = str(Path(sys.executable).parent / "ray")  # Cluster.add_node wants the main thread
    subprocess.Popen([ray_command, "start", "--address", cluster.address, "--num-cpus=1", "--num-gpus=0", "--block",
                      "--object-store-memory=100000000"])
threading.Thread(target=grow, daemon=True).start()
"""
_DRIVER = """
import os, pickle, sys
sys.path[:0] = [{repository!r}, {tests!r}]
from emu_ray.session.on_ray import own_dashboard, quiet
quiet()
import ray
dashboard = own_dashboard(PYTHONPATH={repository!r}, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
{start_ray}
from emu_ray.training import denoiser_run
from tests.training.train_process import watched_work
denoiser_run.denoiser_work = watched_work
for run in pickle.load(open({runs!r}, "rb")):
    denoiser_run.run_denoiser(run)
    print("TRAINED", run.run, flush=True)
print("ALL TRAINED", flush=True)
"""


@dataclass(frozen=True)
class Hold:
    """Where the workers wait to be killed, once: in `run`, when the shards at `step` are written and not yet committed."""

    run: str
    step: int

    def file(self, notes: Path, rank: int) -> Path:
        """Written by the worker that waits: its process id and its node."""
        return notes / f"held-{self.run}-{self.step}-{rank}.json"


def watched_work(recipe: DenoiserRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """`denoiser_work`, with a line a step in `NOTES/reads-RUN.jsonl` and the waiting that `NOTES/holds.pickle` asks for; a file
    `NOTES/gate-RUN` holds the steps from the third on, and slows those that come after it to so many seconds as stand in it, or 1. NOTES is the root, or what TRAIN_NOTES names."""
    notes = Path(os.environ.get("TRAIN_NOTES", recipe.root))
    _note_reads(notes / f"reads-{recipe.run}.jsonl", notes / f"gate-{recipe.run}")
    with open(notes / f"nodes-{recipe.run}", "a") as file:
        file.write(ray.get_runtime_context().get_node_id() + "\n")
    holds = notes / "holds.pickle"
    if holds.exists():
        _wait_at([hold for hold in pickle.loads(holds.read_bytes()) if hold.run == recipe.run], notes)
    return denoiser_work(recipe, worker, folder)


def _note_reads(log: Path, gate: Path) -> None:
    step: Callable[..., None] = _Run._step

    step_s = float(gate.read_text() or 1) if gate.exists() else 0

    def noted(self: _Run, share: Any) -> None:
        while gate.exists() and self.progress.step >= 2:
            time.sleep(0.05)
        time.sleep(step_s if self.progress.step >= 2 else 0)
        with open(log, "a") as file:
            file.write(json.dumps([self.progress.step, self.worker.rank, share.names]) + "\n")
        step(self, share)

    _Run._step = noted  # type: ignore[method-assign]


def _wait_at(holds: list[Hold], notes: Path) -> None:
    write, gather = Checkpoints._write, Checkpoints._all_files
    writing: dict[str, int] = {}

    def noted(self: Checkpoints, state: Any, step: int, progress: str) -> None:
        writing["step"] = step
        write(self, state, step, progress)

    def waiting(self: Checkpoints, mine: Any) -> Any:
        for hold in holds:
            file = hold.file(notes, self.rank)
            if hold.step == writing["step"] and not file.exists():
                told = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
                file.with_suffix(".new").write_text(json.dumps(told))
                file.with_suffix(".new").rename(file)
                time.sleep(60)
        return gather(self, mine)

    Checkpoints._write, Checkpoints._all_files = noted, waiting  # type: ignore[method-assign]


def start_training(
    runs: list[DenoiserRun], notes: Path, log: Path, start_ray: str = ONE_NODE
) -> subprocess.Popen[bytes]:
    """Begin; what it prints is added to `log`. It leads a process group of its own; `notes` takes its recipes and what its workers note."""
    pickled = notes / "runs.pickle"
    pickled.write_bytes(pickle.dumps(runs))
    code = _DRIVER.format(
        repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"), runs=str(pickled), start_ray=start_ray
    )
    quick_to_notice = {
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=out,
            stderr=out,
            env={
                **os.environ,
                **quick_to_notice,
                "TRAIN_NOTES": str(notes),
                "OMP_NUM_THREADS": "1",
                "RAY_AUTH_MODE": "disabled",
                "PYTHONUNBUFFERED": "1",
            },
            start_new_session=True,
            cwd=REPOSITORY,
        )


class Tree:
    """A driver and all it ever started; `with` it, so that none outlives the test."""

    def __init__(self) -> None:
        self.everyone: dict[int, psutil.Process] = {}

    def __enter__(self) -> Tree:
        return self

    def wait(
        self, driver: subprocess.Popen[bytes], log: Path, is_reached: Callable[[], bool], timeout_s: float = 240
    ) -> None:
        """Until `is_reached`; AssertionError when the driver ends before, or time is up."""
        until = time.monotonic() + timeout_s
        while not is_reached():
            with contextlib.suppress(psutil.NoSuchProcess):
                mine = psutil.Process(driver.pid)
                self.everyone.update({p.pid: p for p in (mine, *mine.children(recursive=True))})
            is_alive = driver.poll() is None
            assert (is_alive or is_reached()) and time.monotonic() < until, log.read_text()[-6000:]
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        for process in self.everyone.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self.everyone.values()), timeout=20)


def held(hold: Hold, notes: Path, ranks: Iterable[int] = (0, 1)) -> list[dict[str, Any]] | None:
    """What the waiting workers wrote, by rank; None while one doesn't wait."""
    files = [hold.file(notes, rank) for rank in ranks]
    return [json.loads(file.read_text()) for file in files] if all(file.exists() for file in files) else None
