"""Which stations a training of the U-Net reads and writes: the recipe of the jobs pretrain and quality_tune."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emu_ray.errors import InputError, RecipeError
from emu_ray.models.autoencoder import AutoencoderRecipe
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve
from emu_ray.stations.store import said_plainly
from emu_ray.training.denoiser import DenoiserTraining, LatentSet, held_out_count, train_denoiser
from emu_ray.training.loop import Progress, require_equal_shares
from emu_ray.training.on_ray import RayWorker, TrainJob, WorkersRecipe, run_training


@dataclass(frozen=True, kw_only=True)
class DenoiserRun:
    """`root`/latents/`latents` -> `root`/checkpoints/`run`, a diffusers folder."""

    root: str
    run: str
    latents: str
    training: DenoiserTraining
    workers: WorkersRecipe = field(default=WorkersRecipe(), metadata={"affects_result": False})


def run_denoiser(recipe: DenoiserRun) -> Manifest:
    """Trains under Ray Train, or resumes; the manifest's `extra` holds curves, images seen and why it stopped."""
    require_equal_shares(recipe.training.loop, recipe.workers.count)
    training, inputs = placed(recipe.training, recipe.root)
    inputs["latents"] = require_latents(Station(f"{recipe.root}/latents/{recipe.latents}"), training).fingerprint
    recipe = dataclasses.replace(recipe, training=training)
    return run_training(
        TrainJob(
            target=f"{recipe.root}/checkpoints/{recipe.run}",
            recipe=recipe,
            inputs=inputs,
            work=denoiser_work,
            workers=recipe.workers,
            storage=f"{recipe.root}/ray_train",
        )
    )


def denoiser_work(recipe: DenoiserRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """Runs on each worker: loads the latents, trains, and saves the pipeline on rank 0."""
    training = fetched(recipe.training)
    data = load_latents(Station(f"{recipe.root}/latents/{recipe.latents}"), training.vae)
    pipeline, progress = train_denoiser(training, data, worker)
    if worker.rank == 0:
        pipeline.save_pretrained(folder)
    return summary(progress, training.loop.batch_size, len(data))


def summary(progress: Progress, batch_size: int, examples: int) -> dict[str, Any]:
    """What a report tells of a run."""
    return {
        "steps": progress.step,
        "images_seen": progress.step * batch_size,
        "examples": examples,
        "history": progress.history,
        "inspections": progress.inspections,
        "best_step": progress.best_step or progress.step,
        "stop_reason": progress.stop_reason or f"reached its bound of {progress.step} steps",
    }


def placed(training: DenoiserTraining, root: str) -> tuple[DenoiserTraining, dict[str, str]]:
    """`training` with the folders that it names made absolute, and the fingerprints of their content; for the driver."""
    start = resolve(training.start, root)
    inputs = {"start": content_fingerprint(start)}
    autoencoder = training.autoencoder
    if autoencoder is not None:
        autoencoder = resolve(autoencoder, root)
        inputs["autoencoder"] = content_fingerprint(autoencoder)
    return dataclasses.replace(training, start=start, autoencoder=autoencoder), inputs


def fetched(training: DenoiserTraining) -> DenoiserTraining:
    """`training` with the folders that it names on this machine's disk; for a worker."""
    autoencoder = None if training.autoencoder is None else str(local_folder(training.autoencoder))
    return dataclasses.replace(training, start=str(local_folder(training.start)), autoencoder=autoencoder)


def require_latents(station: Station, training: DenoiserTraining) -> Manifest:
    """The manifest of a `latents` station that `training`, with absolute folders, can learn from; for the driver: reads no latent.

    Raises RecipeError for too few pairs or a U-Net of other channels, InputError for mixed buckets or another autoencoder's latents.
    """
    manifest = station.require("latents")
    pairs = manifest.rows or 0
    held_out_count(pairs if training.max_pairs is None else min(pairs, training.max_pairs), training)
    buckets = pc.unique(station.read_table(["bucket"])["bucket"]).to_pylist()
    if len(buckets) != 1:
        raise InputError(
            f"{station.uri}: expected latents of one bucket, found {', '.join(sorted(buckets)) or 'no rows'}: encode again at one size"
        )
    shape = latent_shape(buckets[0], training.vae)
    lengths = _latent_lengths(station, manifest)
    if lengths != {math.prod(shape)}:
        raise InputError(
            f"{station.uri}: expected latents of {math.prod(shape)} numbers, as {training.vae} makes them of {buckets[0]}, "
            f"found {', '.join(f'{n:g}' for n in sorted(lengths))}: encode again with that autoencoder"
        )
    if training.denoiser is None:
        reads = _config(f"{training.start}/unet")["in_channels"]
        if reads != shape[0]:
            raise RecipeError(
                f"the U-Net of {training.start} reads {reads} channels and {training.vae} makes {shape[0]}: "
                "start from a U-Net trained on its latents, or give a denoiser to make a fresh one"
            )
    return manifest


def latent_shape(bucket: str, autoencoder: str) -> tuple[int, int, int]:
    """(C, h, w) of what the autoencoder in this folder makes of pictures of `bucket`, by its config alone."""
    config = _config(autoencoder)
    known = {f.name for f in dataclasses.fields(AutoencoderRecipe)}
    sizes = AutoencoderRecipe(**{name: value for name, value in config.items() if name in known})
    width, height = (int(side_px) // sizes.downsampling for side_px in bucket.split("x"))
    return sizes.latent_channels, height, width


def _config(folder: str) -> dict[str, Any]:
    return json.loads(Station(folder).get_bytes("config.json"))


def _latent_lengths(station: Station, manifest: Manifest) -> set[float]:
    """Numbers a latent has, by the files' footers: the column itself may be larger than the driver's memory."""
    system, base = station.filesystem()
    found: set[float] = set()
    for name in (n for n in manifest.files if n.endswith(".parquet")):
        with said_plainly("read", station.path(name)):
            footer = pq.read_metadata(f"{base}/{name}", filesystem=system)
        column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path.startswith("latent_mean."))
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        found.update(group.column(column).num_values / group.num_rows for group in groups if group.num_rows)
    return found


def load_latents(station: Station, autoencoder: str) -> LatentSet:
    """The whole station in memory, in the order of its keys; `autoencoder` is the folder of the one that encoded it."""
    table = station.read_table(["key", "bucket", "latent_mean", "caption"]).sort_by("key")
    flat = np.asarray(table["latent_mean"].combine_chunks().flatten(), dtype=np.float16)
    shape = latent_shape(table["bucket"][0].as_py(), autoencoder)
    return LatentSet(flat.reshape(len(table), *shape), table["caption"].to_pylist())
