"""Connects a job to the cluster it was submitted to, or to a Ray of its own on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import warnings

import psutil
import ray

from emu_ray.errors import MemoryShortError

OWN_RAY_BYTES = 3 << 30  # below this a local Ray with two workers of this project starts to swap
OBJECT_STORE_BYTES = 500 << 20


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names (`ray job submit` sets it), or starts a local one; twice is once.

    Raises MemoryShortError when this machine can't hold a local Ray.
    """
    quiet()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    check_memory()
    os.environ.setdefault(
        "RAY_AUTH_MODE", "disabled"
    )  # a Ray of one process tree; a local init would otherwise write a token file
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )


def quiet() -> None:
    """Keeps what a user can do nothing about out of the log; also on the workers, by their environment."""
    for name, value in {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "TQDM_MININTERVAL": "5",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")


def check_memory(needed_bytes: int = OWN_RAY_BYTES) -> None:
    """MemoryShortError unless this machine has the memory, and the shared memory of the object store, that a run needs."""
    free = psutil.virtual_memory().available
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
