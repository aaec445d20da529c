"""Which stations the job train_autoencoder reads and writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emu_ray.encoding.encoder import decode, fit
from emu_ray.errors import InputError
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve
from emu_ray.training.autoencoder import AutoencoderTraining, train_autoencoder
from emu_ray.training.denoiser_run import summary
from emu_ray.training.loop import require_equal_shares
from emu_ray.training.on_ray import RayWorker, TrainJob, WorkersRecipe, run_training


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun:
    """Pictures of `root`/pool that the selection keeps -> `root`/autoencoder."""

    root: str
    training: AutoencoderTraining
    keep_reasons: tuple[str, ...] | None = ("",)  # None takes every row of the pool
    workers: WorkersRecipe = field(default=WorkersRecipe(), metadata={"affects_result": False})


def run_autoencoder(recipe: AutoencoderRun) -> Manifest:
    """Trains under Ray Train, or resumes."""
    require_equal_shares(recipe.training.loop, recipe.workers.count)
    inputs = {"pool": Station(f"{recipe.root}/pool").require("pool").fingerprint}
    if recipe.keep_reasons is not None:
        inputs["selection"] = Station(f"{recipe.root}/selection").require("selection").fingerprint
    if recipe.training.start:
        start = resolve(recipe.training.start, recipe.root)
        inputs["start"] = content_fingerprint(start)
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, start=start))
    return run_training(
        TrainJob(
            target=f"{recipe.root}/autoencoder",
            recipe=recipe,
            inputs=inputs,
            work=autoencoder_work,
            workers=recipe.workers,
            storage=f"{recipe.root}/ray_train",
        )
    )


def autoencoder_work(recipe: AutoencoderRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """Runs on each worker: loads the pictures, trains, and saves the autoencoder on rank 0."""
    training = recipe.training
    if training.start:
        training = dataclasses.replace(training, start=str(local_folder(training.start)))
    images = load_pictures(recipe.root, training.size_px, recipe.keep_reasons)
    network, progress = train_autoencoder(training, images, worker)
    if worker.rank == 0:
        network.save_pretrained(folder)
    return summary(progress, training.loop.batch_size, len(images))


def load_pictures(root: str, size_px: int, keep_reasons: tuple[str, ...] | None) -> np.ndarray:
    """(N, size_px, size_px, 3) uint8 of the pool's rows, by key; rows without a decodable picture are what the selection rejects."""
    pool = Station(f"{root}/pool").read_table(["key", "image"])
    if keep_reasons is not None:
        selection = Station(f"{root}/selection").read_table(["key", "reject_reason"])
        kept = selection.filter(pc.is_in(selection["reject_reason"], pa.array(keep_reasons, pa.string())))
        pool = pool.filter(pc.is_in(pool["key"], kept["key"].combine_chunks()))
    pool = pool.sort_by("key")
    if len(pool) == 0:
        raise InputError(f"no picture of {root}/pool is left to train on: look at the reasons in {root}/selection")
    return np.stack([fit(decode(encoded), size_px) for encoded in pool["image"].to_pylist()])
