"""What a training of the U-Net starts from and ends as: pipeline folders, and where one may stand in for a part of another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from emu_ray.config import require_at_least
from emu_ray.diffusion.schedule import ScheduleRecipe
from emu_ray.errors import RecipeError
from emu_ray.generation.base_folder import BaseFolder, require_base
from emu_ray.generation.families import EMU, family_of
from emu_ray.models.denoiser import DenoiserRecipe, build
from emu_ray.models.hub import read_json
from emu_ray.training.guard import GuardRecipe
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.lora import LoraRecipe, fuse_adapter, require_targets, save_adapter
from emu_ray.training.samples import SampleSheetRecipe
from emu_ray.training.stopping import StoppingRecipe
from emu_ray.training.streaming.order import StreamRecipe


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
    lora: LoraRecipe | None = None  # None trains every weight of the U-Net
    schedule: ScheduleRecipe | None = None  # None = what the scheduler of `start` means
    caption_dropout: float = 0.1
    noise_offset: float = 0.0
    stopping: StoppingRecipe | None = None  # pairs held out, and a loss on them; that loss decides unless a guard does
    guard: GuardRecipe | None = None  # stops by what is drawn for prompts that were never trained on
    samples: SampleSheetRecipe | None = field(
        default=None, metadata={"affects_result": False}
    )  # pictures to look at on the way
    stream: StreamRecipe | None = None  # None holds the whole set in the memory of each worker
    max_pairs: int | None = None  # only the first so many of the set, in the order of a seeded shuffle; None takes all

    def __post_init__(self) -> None:
        require_at_least(self, 0, "noise_offset")
        require_at_least(self, 1, "max_pairs")
        if not 0 <= self.caption_dropout <= 1:
            raise RecipeError(f"caption_dropout of DenoiserTraining must lie in 0 to 1, found {self.caption_dropout}")
        loop = self.loop
        if self.guard is not None and loop.inspect_every_steps is None:
            raise RecipeError("a guard looks every loop.inspect_every_steps: expected a number there, found None")
        if self.samples is not None and loop.show_every_images is None:
            raise RecipeError("samples are drawn every loop.show_every_images: expected a number there, found None")
        if self.guard is not None and self.stopping is None and not (self.guard.prompts or self.guard.prompts_file):
            raise RecipeError(
                "the guard has nothing to draw: expected prompts, a prompts_file, or stopping, which holds pairs out whose captions it draws"
            )

    @property
    def vae(self) -> str:
        """The folder of the autoencoder whose latents are learned."""
        return self.autoencoder or f"{self.start}/vae"


def load_start(recipe: DenoiserTraining, latent_side: int) -> tuple[DiffusionPipeline, nn.Module]:
    """The pipeline that training starts from, and its U-Net: taken over or, with a `denoiser`, fresh from the loop's seed.

    Either way the U-Net's config says `latent_side`, the side of the latents it learns from: sampling draws at that size.
    """
    family = require_start(recipe).family
    with _one_folder(recipe) as folder:
        if recipe.denoiser is None:
            pipeline = family.load(folder)
            pipeline.unet.register_to_config(sample_size=latent_side)
            return pipeline, pipeline.unet
        configs = {part: read_json(folder / part / "config.json") for part in ("vae", "text_encoder", "text_encoder_2")}
        tokens, pooled = family.widths(configs)
        torch.manual_seed(recipe.loop.seed)
        network = build(
            recipe.denoiser,
            latent_channels=int(configs["vae"]["latent_channels"]),
            latent_side=latent_side,
            text_width=tokens,
            pooled_width=pooled,
        )
        return family.load(folder, network), network


def require_start(recipe: DenoiserTraining) -> BaseFolder:
    """What `start`, a folder here or on s3://, is by its configs; InputError for no base, RecipeError for one that the recipe can't use."""
    without = {"vae"} if recipe.autoencoder is not None else set()
    if recipe.denoiser is None:
        base = require_base(recipe.start, without)
        if recipe.lora is not None:
            require_targets(recipe.lora, base.configs["unet"])
        return base
    if recipe.lora is not None:
        raise RecipeError(
            "expected lora or a fresh denoiser, found both: an adapter of random weights has nothing to adapt"
        )
    base = require_base(recipe.start, {*without, "unet"})
    if base.family is not EMU:
        raise RecipeError(
            f"{recipe.start}: a fresh denoiser is built for CLIP and T5, found a {base.family.pipeline_class.__name__}: leave denoiser out to tune its own"
        )
    return base


def save_tuned(pipeline: DiffusionPipeline, recipe: DenoiserTraining, folder: Path) -> None:
    """Writes what `train_denoiser` gave, as a folder of the class of `start` that plain diffusers loads.

    Of a published base, parts that weren't trained are its own files. Of a LoRA, `folder` also gets the adapter by itself, and the
    pipeline ends with the adapter fused; NumericsError when fusing changed what the U-Net says.
    """
    if recipe.lora is not None:
        save_adapter(pipeline, folder)
        fuse_adapter(pipeline.unet)
    with _one_folder(recipe) as base:
        family_of(pipeline).save(pipeline, base, folder)


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
