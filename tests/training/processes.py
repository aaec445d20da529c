"""Several processes on this machine as one gloo group, for tests of what workers do together."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from emu_ray.training.local_worker import LocalWorker


def together(count: int, do: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`do(rank, *arguments)` on each of `count` processes; what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        started = multiprocessing.get_context("forkserver")
        started.set_forkserver_preload(
            ["emu_ray.training.denoiser", "torch.distributed.checkpoint"]
        )  # once, not once a process
        torch.multiprocessing.start_processes(
            _one, (count, folder, do, arguments), nprocs=count, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank: int, count: int, folder: str, do: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    try:
        torch.save(do(rank, *arguments), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def worker_of_group(folder: Any = None) -> LocalWorker:
    """This process's worker in its group."""
    worker = LocalWorker(folder)
    worker.rank, worker.world_size = dist.get_rank(), dist.get_world_size()
    return worker
