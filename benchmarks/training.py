"""What the training engine costs: over a bare loop, against diffusers' script, in memory when sharded, and in waiting for checkpoints.

python -m benchmarks.training [--quick]; the last line is JSON:
  vs_bare_loop            step time by the clock over the bare loop's; vs_bare_loop_cpu the same in CPU time of all threads
  data_wait_share         share of the step spent waiting for the next batch
  vs_diffusers            images/s over those of diffusers' text-to-image script, see training_sides.py
  vs_diffusers_cached     the same were that script handed latents and text features, as ours is
  fsdp_bytes_share_N      weights and moments of one of N gloo workers over those of one worker alone
  fsdp_loss_difference    largest relative difference of a loss to one worker's
  checkpoint_block_share  time that training stands still for a checkpoint over a synchronous save of the same state
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.training_sides import SCHEDULE, ClockedWorker, World, bare, diffusers_way, engine, unet, world
from emu_ray.diffusion.schedule import NoiseSchedule
from emu_ray.training.average import local
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.denoising import DenoiserTask
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe, train
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.player import AdamWSettings, Player


def main(quick: bool) -> None:
    """Alternates the sides and prints the median of their ratios."""
    torch.set_num_threads(1)
    rounds, steps = (3, 6) if quick else (9, 20)
    given = world()
    speed = _speed(given, rounds, steps)
    found: dict[str, float] = speed | _sharded(quick) | {"checkpoint_block_share": _blocked(given, 2 if quick else 6)}
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))


def _speed(given: World, rounds: int, steps: int) -> dict[str, float]:
    ratios: dict[str, list[float]] = {
        "vs_bare_loop": [],
        "vs_bare_loop_cpu": [],
        "data_wait_share": [],
        "vs_diffusers": [],
        "vs_diffusers_cached": [],
    }
    for number in range(rounds):
        sides = [
            ("engine", engine),
            ("bare", bare),
            ("diffusers", diffusers_way),
            ("diffusers, cached", partial(diffusers_way, is_cached=True)),
        ]
        cost = {name: side(given, steps) for name, side in (sides if number % 2 else reversed(sides))}
        ratios["vs_bare_loop"].append(cost["engine"].wall_s / cost["bare"].wall_s)
        ratios["vs_bare_loop_cpu"].append(cost["engine"].cpu_s / cost["bare"].cpu_s)
        ratios["data_wait_share"].append(cost["engine"].data_share)
        ratios["vs_diffusers"].append(cost["diffusers"].wall_s / cost["engine"].wall_s)
        ratios["vs_diffusers_cached"].append(cost["diffusers, cached"].wall_s / cost["engine"].wall_s)
        print(
            "  ".join(
                f"{name} {c.wall_s / steps:.3f} s a step ({c.cpu_s / steps:.3f} of CPU)" for name, c in cost.items()
            ),
            flush=True,
        )
    return {name: statistics.median(values) for name, values in ratios.items()}


def _sharded(quick: bool) -> dict[str, float]:
    found, differences = {}, []
    alone = _shares(0, 1, "")
    for workers in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_shares, (workers, folder), nprocs=workers)
            every = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(workers)]
        found[f"fsdp_bytes_share_{workers}"] = max(one["bytes"] for one in every) / alone["bytes"]
        differences += [abs(a / b - 1) for a, b in zip(every[0]["losses"], alone["losses"], strict=True)]
    return found | {"fsdp_loss_difference": max(differences)}


def _shares(rank: int, workers: int, folder: str) -> dict[str, Any]:
    """Bytes of weights and moments of this worker, and the losses of three steps."""
    torch.set_num_threads(1)
    given = world()
    task = DenoiserTask(unet(), NoiseSchedule(SCHEDULE))
    recipe = LoopRecipe(steps=3, batch_size=8, log_every_steps=1, parallel=ParallelRecipe(sharding="fsdp"))
    worker = LocalWorker()
    worker.rank, worker.world_size = rank, workers
    if workers > 1:
        os.environ.update(GLOO_SOCKET_IFNAME="lo", USE_LIBUV="0")
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", workers), rank=rank, world_size=workers)
    adamw = AdamWSettings(learning_rate=1e-4, beta2=0.99, weight_decay=0.0, clip_norm=1.0)
    player = Player(DenoiserTask(unet(), NoiseSchedule(SCHEDULE)), recipe.parallel, adamw, workers, worker.device)
    held = sum(local(value).untyped_storage().nbytes() for value in player.tensors().values())
    losses = [line["loss"] for line in train(task, given.examples, recipe, worker).history]
    found = {"bytes": held, "losses": losses}
    if workers > 1:
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    return found


def _blocked(given: World, saves: int) -> float:
    """Median over the saves but the first, of each kind; both on the same disk."""
    with tempfile.TemporaryDirectory() as folder:
        worker = ClockedWorker(Path(folder) / "async")
        engine(given, 4 * saves + 4, worker, checkpoint_every_steps=4)
        player = Player(
            DenoiserTask(unet(), NoiseSchedule(SCHEDULE)),
            ParallelRecipe(),
            AdamWSettings(learning_rate=1e-4, beta2=0.99, weight_decay=0.0, clip_norm=1.0),
            1,
            worker.device,
        )
        state = player.tensors() | {
            f"average.{n}": v.clone() for n, v in player.tensors().items() if n.startswith("network.")
        }
        checkpoints, seconds = Checkpoints(Path(folder) / "sync"), []
        for step in range(saves + 1):
            started = time.perf_counter()
            checkpoints.save(state, step, {})
            checkpoints.wait()
            seconds.append(time.perf_counter() - started)
        asynchronous, synchronous = (float(np.median(values[1:])) for values in (worker.kept.blocked[:-1], seconds))
        print(
            f"a checkpoint blocks {asynchronous * 1000:.2f} ms; a synchronous one takes {synchronous * 1000:.1f} ms",
            flush=True,
        )
        return asynchronous / synchronous


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
