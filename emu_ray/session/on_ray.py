"""Connects a job to the cluster it was submitted to, or to a Ray of its own on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.data

from emu_ray.errors import MemoryShortError, ResourceError
from emu_ray.session.ports import free_ports

OWN_RAY_BYTES = 3 << 30  # below this a local Ray with two workers of this project starts to swap
OBJECT_STORE_BYTES = 500 << 20


def connect(gpus: float = 0) -> bool:
    """Joins the cluster that RAY_ADDRESS names (`ray job submit` sets it), or starts a local one; twice is once.

    True when Ray was started here, and so ends with this process. Raises MemoryShortError when this machine can't hold a local Ray, and
    ResourceError when a local one lacks the `gpus` that one actor or worker takes: it would wait for them for ever.
    """
    quiet()
    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        # Workers get it too: Ray Train's watcher asks the state API whether its controller lives, of the newest cluster on the machine
        # unless told which, and takes the workers of a live run away when a second Ray runs beside it (seen on 2.60).
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": {"RAY_ADDRESS": address}})
        _join()
        return False
    check_memory()
    os.environ.setdefault(
        "RAY_AUTH_MODE", "disabled"
    )  # a Ray of one process tree; a local init would otherwise write a token file
    ray.init(
        address="local",
        **own_dashboard(),
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )
    _join()
    found = ray.cluster_resources().get("GPU", 0)
    if gpus > found:
        ray.shutdown()
        raise ResourceError(
            f"this recipe gives {gpus:g} GPU to each of its workers and this machine has {found:g}: submit it to a cluster "
            "(`ray job submit`), or set its GPUs to 0"
        )
    return True


def own_dashboard(**environment: str) -> dict[str, Any]:
    """Arguments of `ray.init` for a Ray on this machine whose workers, with these variables set, know where its own dashboard listens.

    Ray Train's watcher asks the dashboard's state API. Untold, it asks the Ray that this machine's address file names, and each training
    ends with 12 seconds of waiting where that Ray is another or dead (seen on 2.60).
    """
    (port,) = free_ports(1)
    return {
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
        "runtime_env": {"env_vars": {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", **environment}},
    }


def _join() -> None:
    """What every process that joined wants of Ray Data."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it tells each plan it makes
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # and that it draws no bars
    ray.data.DataContext.get_current().enable_progress_bars = (
        False  # the jobs print lines of their own, which fit a log
    )


def quiet() -> None:
    """Keeps what a user can do nothing about out of the log; also on the workers, by their environment."""
    for name, value in {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints each line of a worker twice
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 starves its workers beside anything else on the machine
        "TQDM_MININTERVAL": "5",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")


def check_memory(needed_bytes: int = OWN_RAY_BYTES) -> None:
    """MemoryShortError unless this machine has the memory, and the shared memory of the object store, that a run needs."""
    left = cgroup_free_bytes(Path("/sys/fs/cgroup"))  # in a container psutil sees the host's memory
    free = min(psutil.virtual_memory().available, left if left is not None else sys.maxsize)
    if free < needed_bytes:
        raise MemoryShortError(
            f"expected at least {needed_bytes / 2**30:.1f} GiB of free memory, found {free / 2**30:.1f}: end other programs or use a larger machine"
        )
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else free
    if shared < OBJECT_STORE_BYTES:
        raise MemoryShortError(
            f"expected at least {OBJECT_STORE_BYTES >> 20} MiB free in /dev/shm for Ray's object store, found {shared >> 20}: "
            "give the container more, e.g. `docker run --shm-size=2g`"
        )


def cgroup_free_bytes(folder: Path) -> int | None:
    """What the memory limit of the cgroup mounted at `folder` (version 2 or 1) still leaves; None without a limit.

    File cache that the kernel would give back counts as free, as it does in psutil's `available`.
    """
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            words = (folder / limit).read_text().strip()
            in_use = int((folder / used).read_text())
            stat = (folder / used).with_name("memory.stat").read_text()
        except OSError:
            continue  # the other version, or no such controller
        counts = dict(line.split() for line in stat.splitlines())
        return None if words == "max" else int(words) - in_use + int(counts.get(cache, 0))
    return None
