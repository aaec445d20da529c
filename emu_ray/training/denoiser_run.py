"""Which stations a training of the U-Net reads and writes: the recipe of the jobs pretrain and quality_tune."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from emu_ray.encoding.on_ray import MADE_BY
from emu_ray.errors import InputError, RecipeError
from emu_ray.generation.prompts import file_prompts
from emu_ray.models.autoencoder import identity_of
from emu_ray.records import ORIGIN
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve
from emu_ray.training.denoiser import held_out_count, train_denoiser
from emu_ray.training.latent_set import LatentSet, StreamedSet, ToBatch, means_of, time_ids
from emu_ray.training.loop import Progress, plan_of, require_shares
from emu_ray.training.on_ray import RayWorker, TrainJob, WorkersRecipe, run_training
from emu_ray.training.order import BatchPlan
from emu_ray.training.parallel import require_copies
from emu_ray.training.start import DenoiserTraining, require_start, save_tuned
from emu_ray.training.streaming.on_ray import RayReader, Stage, encoded
from emu_ray.training.streaming.order import OnTheFly, StreamOrder, StreamRecipe
from emu_ray.training.streaming.pictures import COLUMNS as PICTURE_COLUMNS
from emu_ray.training.streaming.pictures import picture_groups
from emu_ray.training.streaming.scan import LatentScan, scan_latents
from emu_ray.training.streaming.windows import WindowedFeed


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
    require_workers(recipe)
    training, inputs = placed(recipe.training, recipe.root)
    if training.stream is not None and training.stream.encode is not None:
        inputs |= require_pictures(recipe.root, training, training.stream.encode)
    else:
        inputs["latents"] = require_latents(Station(f"{recipe.root}/latents/{recipe.latents}"), training).fingerprint
    recipe = dataclasses.replace(recipe, training=training)
    return run_training(
        TrainJob(
            target=f"{recipe.root}/checkpoints/{recipe.run}",
            recipe=recipe,
            inputs=inputs,
            work=denoiser_work,
            workers=recipe.workers,
            loop=recipe.training.loop,
            storage=f"{recipe.root}/ray_train",
        )
    )


def require_workers(recipe: DenoiserRun) -> None:
    """RecipeError where the batch or the sharding can't be divided over the workers, whatever their number becomes."""
    loop, workers = recipe.training.loop, recipe.workers
    require_shares(loop, workers.count)
    require_copies(loop.parallel, workers.count)
    if loop.micro_batch_size == 1 and workers.least is not None:
        raise RecipeError(
            f"micro_batch_size 1 needs a batch that any number of workers divides, found {workers.least} to {workers.count} workers: "
            "set micro_batch_size to 2 or more, or leave workers.least out"
        )


def denoiser_work(recipe: DenoiserRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """Runs on each worker: trains on the latents, and saves the pipeline on rank 0."""
    training, station = fetched(recipe.training), Station(f"{recipe.root}/latents/{recipe.latents}")
    data: dict[str, LatentSet] | StreamedSet
    if training.stream is None:
        data = load_latents(station, training.vae)
        examples = sum(len(part) for part in data.values())
    else:
        data = stream_of(recipe, training, training.stream, worker)
        examples = sum(data.rows.values())
    pipeline, progress = train_denoiser(training, data, worker)
    if worker.rank == 0:
        save_tuned(pipeline, training, folder)
    return summary(progress, examples)


def stream_of(run: DenoiserRun, training: DenoiserTraining, recipe: StreamRecipe, worker: RayWorker) -> StreamedSet:
    """What one worker reads, by Ray Data: latents, or pictures that are encoded on the way."""
    then: Stage | None = None
    if recipe.encode is None:
        station = Station(f"{run.root}/latents/{run.latents}")
        scan = scan_latents(station)
        groups = scan.groups
        columns = ["key", "caption", "latent_mean", *(ORIGIN if scan.knows_sizes else ())]
    else:
        station, columns = Station(f"{run.root}/{recipe.encode.source}"), PICTURE_COLUMNS
        groups, then = picture_groups(run.root, recipe.encode), encoded(training.vae, recipe.encode)

    def feed(plan: BatchPlan, to_batch: ToBatch) -> WindowedFeed:
        order = StreamOrder(groups, plan, lanes=recipe.lanes, window_groups=recipe.window_groups)
        reader = RayReader(station, order, columns, recipe, then)
        return WindowedFeed(order, reader, to_batch, worker.rank, worker.world_size)

    return StreamedSet(
        rows={bucket: int(own.rows.sum()) for bucket, own in groups.items()},
        shapes={bucket: latent_shape(bucket, training.vae) for bucket in groups},
        feed=feed,
    )


def summary(progress: Progress, examples: int) -> dict[str, Any]:
    """What a report tells of a run."""
    return {
        "steps": progress.step,
        "images_seen": progress.images_seen,
        "examples": examples,
        "history": progress.history,
        "inspections": progress.inspections,
        "best_step": progress.best_step or progress.step,
        "stop_reason": progress.stop_reason or f"reached its bound of {progress.step} steps",
    }


def placed(training: DenoiserTraining, root: str) -> tuple[DenoiserTraining, dict[str, str]]:
    """`training` with the places that it names made absolute, and the fingerprints of their content; for the driver.

    Raises InputError for a start that is no base or a prompts file that can't be read, RecipeError for a start that the recipe can't use.
    """
    start = resolve(training.start, root)
    autoencoder = None if training.autoencoder is None else resolve(training.autoencoder, root)
    training = dataclasses.replace(training, start=start, autoencoder=autoencoder)
    require_start(training)
    inputs = {"start": content_fingerprint(start)}
    if autoencoder is not None:
        inputs["autoencoder"] = content_fingerprint(autoencoder)
    guard = training.guard
    if guard is not None:
        if guard.judge.__module__.split(".")[0] != "emu_ray":
            raise RecipeError(
                f"judge of GuardRecipe must be a class of emu_ray, found {guard.judge.__module__}:{guard.judge.__qualname__}: "
                "workers import no other code on a recipe's word"
            )
        if guard.prompts_file is not None:
            guard = dataclasses.replace(guard, prompts=file_prompts(guard.prompts_file), prompts_file=None)
        if guard.weights is not None:
            folder, _, name = resolve(guard.weights, root).rpartition("/")
            guard = dataclasses.replace(guard, weights=f"{folder}/{name}")
            inputs["guard"] = content_fingerprint(folder)
        training = dataclasses.replace(training, guard=guard)
    return training, inputs


def fetched(training: DenoiserTraining) -> DenoiserTraining:
    """`training` with the places that it names on this machine's disk; for a worker."""
    autoencoder = None if training.autoencoder is None else str(local_folder(training.autoencoder))
    guard = training.guard
    if guard is not None and guard.weights is not None:
        folder, _, name = guard.weights.rpartition("/")
        guard = dataclasses.replace(guard, weights=str(local_folder(folder) / name))
    return dataclasses.replace(training, start=str(local_folder(training.start)), autoencoder=autoencoder, guard=guard)


def require_pictures(root: str, training: DenoiserTraining, encode: OnTheFly) -> dict[str, str]:
    """The fingerprints of the stations that pictures encoded on the fly come from; the same errors as `require_latents`."""
    _require_no_held_out(training)
    inputs: dict[str, str] = {encode.source: Station(f"{root}/{encode.source}").require(encode.source).fingerprint}
    if encode.source == "pool" and encode.keep_reasons is not None:
        inputs["selection"] = Station(f"{root}/selection").require("selection").fingerprint
    rows = {bucket: int(own.rows.sum()) for bucket, own in picture_groups(root, encode).items()}
    plan_of(rows, training.loop)
    _require_channels(training, latent_shape(next(iter(rows)), training.vae)[0])
    return inputs


def _require_no_held_out(training: DenoiserTraining) -> None:
    if training.stream is not None and (training.stopping is not None or training.max_pairs is not None):
        raise RecipeError("a streamed set can't hold pairs out or be cut: leave out stream, or stopping and max_pairs")


def _require_channels(training: DenoiserTraining, channels: int) -> bool:
    """Whether the U-Net is told sizes; RecipeError for one that reads other channels, or draws with an autoencoder of another class."""
    base = require_start(training)
    vae, classes = _config(training.vae).get("_class_name"), base.family.parts["vae"]
    if vae not in classes:
        raise RecipeError(
            f"{training.vae}: a {base.family.pipeline_class.__name__} draws with a {' or '.join(sorted(classes))}, found {vae!r}: give another autoencoder"
        )
    if training.denoiser is not None:
        return training.denoiser.micro_conditioning
    unet = base.configs["unet"]
    if unet["in_channels"] != channels:
        raise RecipeError(
            f"the U-Net of {training.start} reads {unet['in_channels']} channels and {training.vae} makes {channels}: "
            "start from a U-Net trained on its latents, or give a denoiser to make a fresh one"
        )
    return unet.get("addition_embed_type") == "text_time"


def require_latents(station: Station, training: DenoiserTraining) -> Manifest:
    """The manifest of a `latents` station that `training`, with absolute folders, can learn from; for the driver: reads no latent.

    Raises RecipeError for too few pairs or a U-Net of other channels, InputError for another autoencoder's latents, or
    latents without the sizes and crops that the U-Net is told.
    """
    manifest = station.require("latents")
    pairs = manifest.rows or 0
    held_out_count(pairs if training.max_pairs is None else min(pairs, training.max_pairs), training)
    _require_no_held_out(training)
    scan = scan_latents(station)
    shapes = require_shapes(station, scan, training)
    made_by = manifest.extra.get(MADE_BY)
    if made_by is not None and made_by != identity_of(local_folder(training.vae)):
        raise InputError(
            f"{station.uri}: its latents were made by another autoencoder than {training.vae}, though of the same sizes: encode again with "
            "that one, or name the one they were made by as training.autoencoder"
        )
    if _require_channels(training, shapes[0][0]) and not scan.knows_sizes:
        raise InputError(
            f"{station.uri}: expected the columns {', '.join(ORIGIN)} without nulls, which this U-Net is told, found rows without: encode again"
        )
    return manifest


def require_shapes(station: Station, scan: LatentScan, training: DenoiserTraining) -> list[tuple[int, int, int]]:
    """(C, h, w) of each bucket's latents; InputError when they aren't the autoencoder's, RecipeError when the recipe names other buckets."""
    rows = scan.rows
    if not rows:
        raise InputError(f"{station.uri}: expected latents, found no rows: look at the counts of the station before it")
    plan_of(rows, training.loop)
    shapes = [latent_shape(bucket, training.vae) for bucket in sorted(rows)]
    expected, lengths = {math.prod(shape) for shape in shapes}, scan.latent_lengths
    if lengths != expected:
        raise InputError(
            f"{station.uri}: expected latents of {_listed(expected)} numbers, as {training.vae} makes them of {', '.join(sorted(rows))}, "
            f"found {_listed(lengths)}: encode again with that autoencoder"
        )
    if training.stream is None and training.loop.batch_size > sum(rows.values()):
        print(
            f"{station.uri}: a batch of {training.loop.batch_size} is larger than the set of {sum(rows.values())} pairs: "
            "pairs come several times in a batch, each time with other noise",
            flush=True,
        )
    return shapes


def _listed(numbers: set[Any]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers))


def latent_shape(bucket: str, autoencoder: str) -> tuple[int, int, int]:
    """(C, h, w) of what the autoencoder in this folder, ours or a published one, makes of pictures of `bucket`, by its config alone."""
    config = _config(autoencoder)
    factor = config.get("space_to_depth", 1) * 2 ** (len(config["block_out_channels"]) - 1)
    width, height = (int(side_px) // factor for side_px in bucket.split("x"))
    return int(config["latent_channels"]), height, width


def _config(folder: str) -> dict[str, Any]:
    return json.loads(Station(folder).get_bytes("config.json"))


def load_latents(station: Station, autoencoder: str) -> dict[str, LatentSet]:
    """The whole station in memory by bucket, each in the order of its keys; `autoencoder` is the folder of the one that encoded it."""
    station.require("latents")
    has_origin = scan_latents(station).knows_sizes
    table = station.read_table(["key", "bucket", "latent_mean", "caption", *(ORIGIN if has_origin else ())]).sort_by(
        "key"
    )
    found = {}
    for bucket in sorted(pc.unique(table["bucket"]).to_pylist()):
        rows = table.filter(pc.equal(table["bucket"], bucket))
        found[bucket] = LatentSet(
            means=means_of(rows, latent_shape(bucket, autoencoder)),
            captions=rows["caption"].to_pylist(),
            time_ids=time_ids(rows, bucket) if has_origin else None,
            keys=rows["key"].to_numpy(),
        )
    return found
