"""Pretraining and quality-tuning: one recipe of the train function over cached latents. No Ray here.

Quality-tuning differs from pretraining in three numbers and one habit (arXiv 2309.15807, section 3.3): batch 64, noise offset 0.1, at most
15,000 steps, and it stops although the training loss still falls. The habit is here a held-out loss with frozen noise: the weights of
its minimum are kept, and training ends when it has not improved for `patience` looks. How to detect the end is our choice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import RecipeError
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.models.denoiser import DenoiserRecipe, build
from emu_ray.models.text import TextEncoders
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.loop import Inspection, LoopRecipe, Progress, Worker, rows_at, sample_rng, train


@dataclass(frozen=True, kw_only=True)
class StoppingRecipe:
    """When quality-tuning ends: `held_out` of the pairs are never trained on; the loss on them decides."""

    held_out: float = 0.1  # share of the pairs, 0 to 1
    patience: int = 4  # inspections without improvement
    draws: int = 8  # frozen (noise, step) draws of every held-out pair


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """What is trained, how, and from where.

    `start` is a pipeline folder whose parts are taken over; its U-Net too, unless `denoiser` asks for a fresh one, and its vae, unless
    `autoencoder` names a folder to take in its place. In both, ROOT/ stands for the run's root; their content counts.
    """

    loop: LoopRecipe
    start: str = field(metadata={"affects_result": False})
    autoencoder: str | None = field(default=None, metadata={"affects_result": False})
    denoiser: DenoiserRecipe | None = None
    schedule: ScheduleRecipe = ScheduleRecipe()
    caption_dropout: float = 0.1
    noise_offset: float = 0.0
    stopping: StoppingRecipe | None = None
    max_pairs: int | None = None  # only the first so many of the set, in the order of a seeded shuffle; None takes all

    @property
    def vae(self) -> str:
        """The folder of the autoencoder whose latents are learned."""
        return self.autoencoder or f"{self.start}/vae"


@dataclass(frozen=True)
class LatentSet:
    """The rows of a `latents` station in memory: raw means (N, C, h, w) float16 and their captions."""

    means: np.ndarray
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: np.ndarray) -> LatentSet:
        """The rows at these indices, in their order."""
        return LatentSet(self.means[rows], [self.captions[i] for i in rows])


def train_denoiser(
    recipe: DenoiserTraining,
    data: LatentSet,
    worker: Worker,
    look: Callable[[int, EmuPipeline], Inspection] | None = None,
) -> tuple[EmuPipeline, Progress]:
    """The trained pipeline and what the run reached; all ranks take part and end with the same weights.

    `start` and `autoencoder` are local folders here. `look` inspects the pipeline with averaged weights every
    `loop.inspect_every_steps`, in place of the recipe's `stopping`. Raises RecipeError for a set smaller than its held-out part needs.
    """
    pipeline, network = load_start(recipe, latent_side=data.means.shape[-1])
    rows = np.arange(len(data))
    if recipe.max_pairs is not None:
        rows = rows_at(rows, len(data), recipe.loop.seed)[: recipe.max_pairs]
    held, kept = _split(rows, recipe)
    texts, text_of = encode_captions(pipeline.texts, data.captions)
    latents = pipeline.vae.normalize(torch.from_numpy(data.means.astype(np.float32))).numpy().astype(np.float16)
    examples = LatentExamples(
        latents[kept], text_of[kept], texts, recipe.caption_dropout, recipe.noise_offset, recipe.schedule.train_steps
    )
    task = DenoiserTask(network, NoiseSchedule(recipe.schedule))
    inspect: Callable[[int, nn.Module], Inspection] | None = None
    if look is not None:
        pipeline.register_modules(unet=network)

        def inspect(step: int, network: nn.Module) -> Inspection:
            return look(step, pipeline)

    elif len(held):
        assert recipe.stopping is not None
        held_out = LatentExamples(latents[held], text_of[held], texts, 0.0, 0.0, recipe.schedule.train_steps)
        inspect = HeldOutLoss(task, held_out, recipe.stopping, recipe.loop.seed)
    progress = train(task, examples, recipe.loop, worker, inspect)
    pipeline.register_modules(unet=network.to("cpu"), scheduler=NoiseSchedule(recipe.schedule).scheduler())
    return pipeline, progress


def load_start(recipe: DenoiserTraining, latent_side: int) -> tuple[EmuPipeline, nn.Module]:
    """The pipeline that training starts from, and its U-Net: taken over or, with a `denoiser`, fresh from the loop's seed.

    Either way the U-Net's config says `latent_side`, the side of the latents it learns from: sampling draws at that size.
    """
    with _one_folder(recipe) as folder:
        if recipe.denoiser is None:
            pipeline = EmuPipeline.load(folder)
            pipeline.unet.register_to_config(sample_size=latent_side)
            return pipeline, pipeline.unet
        vae = FourierAutoencoder.load_config(folder / "vae")
        clip = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        t5 = T5Config.from_pretrained(folder / "text_encoder_2")
        torch.manual_seed(recipe.loop.seed)
        network = build(
            recipe.denoiser,
            latent_channels=int(vae["latent_channels"]),  # type: ignore[index]
            latent_side=latent_side,
            text_width=clip.hidden_size + t5.d_model,
        )
        return EmuPipeline.load(folder, network), network


@contextmanager
def _one_folder(recipe: DenoiserTraining) -> Iterator[Path]:
    """`start` as it is or, for a pipeline is read from one folder, links to its parts and to `autoencoder` as the vae."""
    start = Path(recipe.start).absolute()
    if recipe.autoencoder is None:
        yield start
        return
    with tempfile.TemporaryDirectory() as links:
        parts = {part.name: part for part in start.iterdir()} | {"vae": Path(recipe.autoencoder).absolute()}
        for name, part in parts.items():
            (Path(links) / name).symlink_to(part)
        yield Path(links)


@torch.no_grad()
def encode_captions(texts: TextEncoders, captions: list[str], batch_size: int = 256) -> tuple[Tensor, np.ndarray]:
    """Features (M, T, D) float16 of the distinct captions, row 0 the empty one, and the row of each caption (N,)."""
    distinct = ["", *sorted(set(captions) - {""})]
    row_of = {caption: i for i, caption in enumerate(distinct)}
    parts = [texts(distinct[i : i + batch_size]).half() for i in range(0, len(distinct), batch_size)]
    return torch.cat(parts), np.array([row_of[c] for c in captions])


class HeldOutLoss:
    """Inspection by the mean squared error on held-out pairs with frozen noise and steps; lower is better."""

    def __init__(self, task: DenoiserTask, examples: LatentExamples, stopping: StoppingRecipe, seed: int) -> None:
        self.task, self.stopping = task, stopping
        count = len(examples)
        self.batches = [
            examples.batch(np.arange(count), [sample_rng(seed + 1, draw * count + i) for i in range(count)])
            for draw in range(stopping.draws)
        ]
        for draw, batch in enumerate(
            self.batches
        ):  # the steps evenly spread instead of drawn: less noise in the measure
            spread = (np.arange(count) * stopping.draws + draw + 0.5) / (count * stopping.draws)
            batch["t"] = torch.from_numpy((spread * examples.train_steps).astype(np.int64))
        self.seen: list[float] = []  # in this process; what came before a resume is handed over by `resume`

    def __call__(self, step: int, network: nn.Module) -> Inspection:
        """One look at the network as it is."""
        device = next(network.parameters()).device
        losses = [self.task({k: v.to(device) for k, v in batch.items()})["mse"] for batch in self.batches]
        loss = float(torch.stack(losses).mean())
        self.seen.append(loss)
        since_best = len(self.seen) - 1 - int(np.argmin(self.seen))
        reason = None
        if since_best >= self.stopping.patience:
            reason = f"the held-out loss has not improved for {since_best} inspections (best {min(self.seen):.4f})"
        return Inspection(metrics={"held_out_mse": loss}, score=-loss, stop_reason=reason)

    def resume(self, inspections: list[dict[str, float]]) -> None:
        """Takes over what earlier processes of the run found, so that patience counts on."""
        self.seen = [found["held_out_mse"] for found in inspections]


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


def _split(rows: np.ndarray, recipe: DenoiserTraining) -> tuple[np.ndarray, np.ndarray]:
    count = held_out_count(len(rows), recipe)
    if count == 0:
        return rows[:0], rows
    shuffled = rows[np.random.default_rng([recipe.loop.seed, 99]).permutation(len(rows))]
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])
