"""`score` in a process of its own, with a Ray of its own: what tests kill, or run with another environment."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from emu_ray.curation.on_ray import ScoreRecipe

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_NODE = """
ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=150_000_000,
         log_to_driver=False, runtime_env=workers)
"""
TWO_NODES = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, num_gpus=0, object_store_memory=150_000_000))
second = cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=150_000_000)
ray.init(address=cluster.address, log_to_driver=False, runtime_env=workers)
print("SECOND", second.all_processes["raylet"][0].process.pid, flush=True)
"""
_DRIVER = """
import os, pickle, sys
sys.path[:0] = [{repository!r}, {tests!r}]
os.environ["RAY_worker_niceness"] = "0"
import ray
workers = {{"env_vars": {{"PYTHONPATH": {repository!r}, "OMP_NUM_THREADS": "1"}}}}
{start_ray}
from emu_ray.curation.on_ray import score
score(pickle.load(open({recipe!r}, "rb")))
print("SCORED", flush=True)
"""


def start_scoring(
    recipe: ScoreRecipe, folder: Path, log: Path, start_ray: str = ONE_NODE, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Begin; what it prints is added to `log`. It leads a process group of its own; `folder` takes its recipe."""
    pickled = folder / "recipe.pickle"
    pickled.write_bytes(pickle.dumps(recipe))
    code = _DRIVER.format(
        repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"), recipe=str(pickled), start_ray=start_ray
    )
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=out,
            stderr=out,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RAY_AUTH_MODE": "disabled",
                "PYTHONUNBUFFERED": "1",
                **(environment or {}),
            },
            start_new_session=True,
            cwd=REPOSITORY,
        )


def end_all(driver: subprocess.Popen[bytes], others: Iterable[psutil.Process] = ()) -> None:
    """Kill the driver, its children and `others`, by their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        others = [*others, *psutil.Process(driver.pid).children(recursive=True)]
    for process in (driver, *others):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait(20)


def wait_for(said: str, log: Path, driver: subprocess.Popen[bytes], timeout_s: float = 200) -> None:
    """Until the process has printed `said`; AssertionError when it ends first, or time is up."""
    until = time.monotonic() + timeout_s
    while said not in log.read_text():
        assert driver.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.1)
