"""Sheets of sample pictures on the way: the same prompts with the same noise every so many images, so that progress can be seen."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from diffusers import DiffusionPipeline
from torch import nn

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError
from emu_ray.generation.generator import SamplingSettings, draw
from emu_ray.generation.samples import contact_sheet
from emu_ray.training.loop import Worker


@dataclass(frozen=True, kw_only=True)
class SampleSheetRecipe:
    """What is drawn every `loop.show_every_images`."""

    prompts: tuple[str, ...]
    settings: SamplingSettings = SamplingSettings(steps=20, guidance=4.0)
    columns: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        require_at_least(self, 1, "columns")
        if not self.prompts:
            raise RecipeError("prompts of SampleSheetRecipe is empty: expected at least one")


@runtime_checkable
class Shows(Protocol):
    """A worker that keeps pictures."""

    def show(self, png: bytes, images_seen: int) -> None: ...


class SampleSheet:
    """Draws the sheet with the pipeline as it is, and hands it to the worker on rank 0."""

    def __init__(self, recipe: SampleSheetRecipe, pipeline: DiffusionPipeline, worker: Worker) -> None:
        self.recipe, self.pipeline, self.worker = recipe, pipeline, worker

    def __call__(self, images_seen: int, network: nn.Module) -> None:
        """One sheet after so many images."""
        prompts = list(self.recipe.prompts)
        images = draw(self.pipeline, prompts, [self.recipe.seed + i for i in range(len(prompts))], self.recipe.settings)
        if self.worker.rank == 0 and isinstance(self.worker, Shows):
            sheet = contact_sheet(images, min(self.recipe.columns, math.ceil(len(prompts))))
            out = io.BytesIO()
            sheet.save(out, "PNG")
            self.worker.show(out.getvalue(), images_seen)
