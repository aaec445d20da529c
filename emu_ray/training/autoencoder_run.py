"""Which stations the job train_autoencoder reads and writes."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emu_ray.config import require_at_least
from emu_ray.encoding.encoder import decode, fit
from emu_ray.errors import InputError, RecipeError
from emu_ray.models.hub import is_hub_name
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve
from emu_ray.training.autoencoder import AutoencoderTraining, StreamedPictures, train_autoencoder
from emu_ray.training.denoiser_run import summary
from emu_ray.training.latent_set import ToBatch
from emu_ray.training.loop import require_shares
from emu_ray.training.on_ray import RayWorker, TrainJob, WorkersRecipe, run_training
from emu_ray.training.order import BatchPlan
from emu_ray.training.reconstruction import is_held_out
from emu_ray.training.streaming.on_ray import RayReader, fitted, read_group
from emu_ray.training.streaming.order import OnTheFly, RowGroups, StreamOrder, StreamRecipe
from emu_ray.training.streaming.pictures import COLUMNS as PICTURE_COLUMNS
from emu_ray.training.streaming.pictures import picture_groups
from emu_ray.training.streaming.windows import WindowedFeed


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun:
    """Pictures of `root`/pool that the selection keeps -> `root`/`name`."""

    root: str
    training: AutoencoderTraining
    name: str = "autoencoder"
    keep_reasons: tuple[str, ...] | None = ("",)  # None takes every row of the pool
    held_out_every: int | None = None  # keys that this divides are not trained on: jobs.evaluate_autoencoder shows them
    workers: WorkersRecipe = field(default=WorkersRecipe(), metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(self, 2, "held_out_every")


def run_autoencoder(recipe: AutoencoderRun) -> Manifest:
    """Trains under Ray Train, or resumes."""
    require_shares(recipe.training.loop, recipe.workers.count)
    inputs = {"pool": Station(f"{recipe.root}/pool").require("pool").fingerprint}
    if recipe.keep_reasons is not None:
        inputs["selection"] = Station(f"{recipe.root}/selection").require("selection").fingerprint
    places: dict[str, Any] = {}
    if recipe.training.start:
        places["start"] = resolve(recipe.training.start, recipe.root)
        if is_hub_name(places["start"]):
            inputs["start"] = places["start"]
        else:
            inputs["start"] = content_fingerprint(places["start"])
            _require_same_held_out(places["start"], recipe.held_out_every, inputs["pool"])
    if recipe.training.perceptual:
        places["perceptual"] = resolve(recipe.training.perceptual, recipe.root)
        inputs["perceptual"] = _digest(places["perceptual"])
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **places))
    return run_training(
        TrainJob(
            target=f"{recipe.root}/{recipe.name}",
            recipe=recipe,
            inputs=inputs,
            work=autoencoder_work,
            workers=recipe.workers,
            loop=recipe.training.loop,
            storage=f"{recipe.root}/ray_train",
        )
    )


def autoencoder_work(recipe: AutoencoderRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """Runs on each worker: loads the pictures, trains, and saves the autoencoder on rank 0."""
    training = recipe.training
    if training.start and not is_hub_name(training.start):
        training = dataclasses.replace(training, start=str(local_folder(training.start)))
    pictures: np.ndarray | StreamedPictures
    if training.stream is None:
        pictures = load_pictures(recipe.root, training.size_px, recipe.keep_reasons, recipe.held_out_every)
        examples = len(pictures)
    else:
        pictures = streamed_pictures(recipe, training.stream, worker)
        examples = pictures.rows
    network, progress = train_autoencoder(training, pictures, worker)
    if worker.rank == 0:
        network.save_pretrained(folder)
    return summary(progress, examples)


def streamed_pictures(recipe: AutoencoderRun, stream: StreamRecipe, worker: RayWorker) -> StreamedPictures:
    """What one worker reads, by Ray Data; latents are measured on the pictures of the first row groups."""
    size_px, pool = recipe.training.size_px, Station(f"{recipe.root}/pool")
    taken = OnTheFly(size_px=size_px, keep_reasons=recipe.keep_reasons)
    groups = picture_groups(recipe.root, taken, recipe.held_out_every)

    def feed(plan: BatchPlan, to_batch: ToBatch) -> WindowedFeed:
        order = StreamOrder(groups, plan, lanes=stream.lanes, window_groups=stream.window_groups)
        reader = RayReader(pool, order, PICTURE_COLUMNS, stream, fitted(size_px, stream.readers))
        return WindowedFeed(order, reader, to_batch, worker.rank, worker.world_size)

    (own,) = groups.values()
    return StreamedPictures(
        int(own.rows.sum()), feed, _first_pictures(pool, own, size_px, recipe.training.measured_images)
    )


def _first_pictures(pool: Station, groups: RowGroups, size_px: int, count: int) -> np.ndarray:
    found: list[np.ndarray] = []
    for group in groups:
        rows = read_group(pool, group, ["key", "image"]).slice(0, count - len(found)).to_pylist()
        found += [fit(decode(row["image"], row["key"]), (size_px, size_px)).pixels for row in rows]
        if len(found) == count:
            break
    return np.stack(found)


def load_pictures(
    root: str, size_px: int, keep_reasons: tuple[str, ...] | None, held_out_every: int | None = None
) -> np.ndarray:
    """(N, size_px, size_px, 3) uint8 of the pool's rows but the held-out ones, by key; rows without a decodable picture are what the selection rejects."""
    pool = Station(f"{root}/pool").read_table(["key", "image"])
    if keep_reasons is not None:
        selection = Station(f"{root}/selection").read_table(["key", "reject_reason"])
        kept = selection.filter(pc.is_in(selection["reject_reason"], pa.array(keep_reasons, pa.string())))
        pool = pool.filter(pc.is_in(pool["key"], kept["key"].combine_chunks()))
    if held_out_every is not None:
        pool = pool.filter(pa.array(~is_held_out(pool["key"].to_numpy(), held_out_every)))
    pool = pool.sort_by("key")
    if len(pool) == 0:
        raise InputError(f"no picture of {root}/pool is left to train on: look at the reasons in {root}/selection")
    pictures = zip(pool["image"].to_pylist(), pool["key"].to_pylist(), strict=True)
    return np.stack([fit(decode(encoded, key), (size_px, size_px)).pixels for encoded, key in pictures])


def _require_same_held_out(start: str, held_out_every: int | None, pool: str) -> None:
    """RecipeError where the autoencoder that is trained on saw pictures of this pool that are to be held out now."""
    manifest = Station(start).manifest()
    if held_out_every is None or manifest is None or manifest.inputs.get("pool") != pool:
        return
    before = manifest.recipe.get("held_out_every")
    if before != held_out_every:
        raise RecipeError(
            f"{start} was trained on this pool with held_out_every {before}, found {held_out_every} now: "
            "pictures that it saw would count as held out; use the same number"
        )


def _digest(address: str) -> str:
    """16 hex digits of a file's bytes; a hub's name as it is. InputError when there is no such file."""
    if is_hub_name(address):
        return address
    if not Path(address).is_file():
        raise InputError(f"{address}: expected the file of a backbone's weights, found none: give another path")
    return hashlib.sha256(Path(address).read_bytes()).hexdigest()[:16]
