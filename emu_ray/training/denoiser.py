"""Pretraining and quality-tuning: one recipe of the train function over cached latents. No Ray here.

Quality-tuning differs from pretraining in three numbers and one habit (arXiv 2309.15807, section 3.3): batch 64, noise offset 0.1, at most
15,000 steps, and it stops although the training loss still falls. The habit is here a held-out loss with frozen noise: the weights of
its minimum are kept, and training ends when it has not improved for `patience` looks. How to detect the end is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from diffusers import DiffusionPipeline
from torch import nn

from emu_ray.diffusion.schedule import NoiseSchedule, schedule_of
from emu_ray.errors import InputError, RecipeError
from emu_ray.generation.families import family_of
from emu_ray.models.autoencoder import Autoencoder
from emu_ray.models.denoiser import is_micro_conditioned
from emu_ray.models.text import TextFeatures
from emu_ray.training.denoising import Corruption, DenoiserTask, LatentExamples
from emu_ray.training.feed import Batch, Feed
from emu_ray.training.latent_set import LatentSet, StreamedSet, ToBatch, means_of, taken, time_ids
from emu_ray.training.looks import Look, Looks, at_work, features_of
from emu_ray.training.loop import Progress, Worker, plan_of, train
from emu_ray.training.lora import add_adapter
from emu_ray.training.order import rows_at
from emu_ray.training.start import DenoiserTraining, load_start


def train_denoiser(
    recipe: DenoiserTraining,
    data: LatentSet | Mapping[str, LatentSet] | StreamedSet,
    worker: Worker,
    look: Look | None = None,
) -> tuple[DiffusionPipeline, Progress]:
    """The trained pipeline, of the class of `start`, and what the run reached; all ranks take part and end with the same weights.

    `start`, `autoencoder` and the guard's weights are local files here; `data` may be by bucket. `look` inspects the pipeline with averaged
    weights every `loop.inspect_every_steps`, in place of the recipe's `guard` and `stopping`. Raises RecipeError for a set smaller than
    its held-out part needs. A LoRA's adapter is left beside the frozen weights: `save_tuned` writes both forms. With sharded weights the
    pipeline is whole on rank 0 alone.
    """
    sets = {"": data} if isinstance(data, LatentSet) else data
    pipeline, network = load_start(recipe, _latent_side(sets))
    if recipe.lora is not None:
        add_adapter(network, recipe.lora, recipe.loop.seed)
    own = schedule_of(pipeline.scheduler.config, f"the scheduler of {recipe.start}")
    schedule = NoiseSchedule(recipe.schedule or own)
    corruption = Corruption(
        caption_dropout=recipe.caption_dropout,
        noise_offset=recipe.noise_offset,
        train_steps=schedule.recipe.train_steps,
    )
    own_parts = at_work(pipeline, recipe, worker)
    looks = Looks(recipe, own_parts, worker, look)
    if isinstance(sets, StreamedSet):
        task = DenoiserTask(network, schedule, features_of(own_parts))
        progress = train(
            task, _feed(recipe, pipeline, sets, corruption), recipe.loop, worker, looks.without_held_out(), looks.show
        )
    else:
        task = DenoiserTask(network, schedule)
        held, kept = split(sets, recipe)
        examples = _examples(recipe, own_parts, kept, corruption)
        held_examples = _examples(recipe, own_parts, held, replace(corruption, caption_dropout=0.0, noise_offset=0.0))
        inspect = looks.inspection(
            task, list(held_examples.values()), [c for part in held.values() for c in part.captions]
        )
        progress = train(task, examples, recipe.loop, worker, inspect, looks.show)
    pipeline.register_modules(
        unet=task.network
    )  # of sharded weights the loop makes another: whole on rank 0, without weights elsewhere
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and not any(p.is_meta for p in part.parameters()):
            part.to("cpu")
    if replace(schedule.recipe, min_snr_gamma=None) != own:
        pipeline.register_modules(scheduler=schedule.scheduler())
    return pipeline, progress


def _latent_side(sets: Mapping[str, LatentSet] | StreamedSet) -> int:
    """The side of the square latents, or of those of the same area: what the model draws when nobody says a size."""
    shapes = sets.shapes.values() if isinstance(sets, StreamedSet) else [part.means.shape[1:] for part in sets.values()]
    squares = [shape[-1] for shape in shapes if shape[-1] == shape[-2]]
    return max(squares) if squares else round(max(shape[-1] * shape[-2] for shape in shapes) ** 0.5)


def _feed(recipe: DenoiserTraining, pipeline: DiffusionPipeline, data: StreamedSet, corruption: Corruption) -> Feed:
    is_told, normalize = is_micro_conditioned(pipeline.unet), _normalizer(family_of(pipeline).autoencoder(pipeline))

    def to_batch(bucket: str, table: pa.Table, rngs: list[np.random.Generator]) -> Batch:
        shape = data.shapes[bucket]
        noise, t, dropped = corruption.draw(shape, rngs)
        captions = [
            None if drop else caption for drop, caption in zip(dropped, table["caption"].to_pylist(), strict=True)
        ]
        batch: Batch = {
            "clean": torch.from_numpy(normalize(means_of(table, shape)).astype(np.float32)),
            "noise": noise,
            "t": t,
        }
        if is_told:
            batch["time_ids"] = torch.from_numpy(time_ids(table, bucket).astype(np.float32))
        return batch | {"captions": captions}

    made: ToBatch = to_batch
    return data.feed(plan_of(data.rows, recipe.loop), made)


def _normalizer(autoencoder: Autoencoder) -> Callable[[np.ndarray], np.ndarray]:
    """Raw latents, float16, to normalized ones, float16; where the autoencoder lies."""

    @torch.no_grad()
    def normalize(means: np.ndarray) -> np.ndarray:
        device = next(autoencoder.parameters()).device
        return (
            autoencoder.normalize(torch.from_numpy(means.astype(np.float32)).to(device))
            .cpu()
            .numpy()
            .astype(np.float16)
        )

    return normalize


def _examples(
    recipe: DenoiserTraining, pipeline: DiffusionPipeline, data: Mapping[str, LatentSet], corruption: Corruption
) -> dict[str, LatentExamples]:
    is_told = is_micro_conditioned(pipeline.unet)
    if is_told and any(part.time_ids is None for part in data.values()):
        raise InputError(
            f"the U-Net of {recipe.start} is told sizes and crops, and the latents have none: encode them again"
        )
    normalize = _normalizer(family_of(pipeline).autoencoder(pipeline))
    text, row_of = encode_captions(pipeline, [caption for part in data.values() for caption in part.captions])
    return {
        bucket: LatentExamples(
            latents=normalize(part.means),
            text_of=np.array([row_of[caption] for caption in part.captions]),
            texts=text.tokens_BTD,
            corruption=corruption,
            pooled=text.pooled_BD if is_told else None,
            time_ids=part.time_ids if is_told else None,
            keys=part.keys,
        )
        for bucket, part in data.items()
    }


@torch.no_grad()
def encode_captions(
    pipeline: DiffusionPipeline, captions: list[str], batch_size: int = 256
) -> tuple[TextFeatures, dict[str, int]]:
    """Features in float16, on the CPU, of no caption, as row 0, and of the distinct captions (M rows); and the row of each caption."""
    family, distinct = family_of(pipeline), sorted(set(captions))
    parts = [family.unconditional(pipeline)]
    parts += [family.features(pipeline, distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)]
    tokens = torch.cat([part.tokens_BTD.half().cpu() for part in parts])
    pooled = [part.pooled_BD.half().cpu() for part in parts if part.pooled_BD is not None]
    return TextFeatures(tokens, torch.cat(pooled) if pooled else None), {c: i + 1 for i, c in enumerate(distinct)}


def held_out_count(pairs: int, recipe: DenoiserTraining) -> int:
    """How many of the `pairs` are never trained on; RecipeError when none would be left to train on."""
    if recipe.stopping is None:
        return 0
    count = max(1, round(recipe.stopping.held_out * pairs))
    if count >= pairs:
        raise RecipeError(
            f"the set has {pairs} pairs, and {count} would be held out: expected at least 2 and a held_out below 1; choose more images"
        )
    return count


def split(data: Mapping[str, LatentSet], recipe: DenoiserTraining) -> tuple[dict[str, LatentSet], dict[str, LatentSet]]:
    """The held-out pairs and those that are trained on, each by bucket."""
    rows = np.arange(sum(len(part) for part in data.values()))
    if recipe.max_pairs is not None:
        rows = rows_at(rows, len(rows), recipe.loop.seed)[: recipe.max_pairs]
    count = held_out_count(len(rows), recipe)
    if count == 0:
        return {}, taken(data, rows)
    shuffled = rows[np.random.default_rng([recipe.loop.seed, 99]).permutation(len(rows))]
    return taken(data, np.sort(shuffled[:count])), taken(data, np.sort(shuffled[count:]))
