"""What a training of the U-Net looks at on the way: the caller's look, the guard, a held-out loss, sheets of samples; and with what it draws."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import nn

from emu_ray.errors import RecipeError
from emu_ray.generation.families import family_of
from emu_ray.models.text import TextFeatures
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.guard import Guard
from emu_ray.training.loop import Inspection, Worker
from emu_ray.training.samples import SampleSheet
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.stopping import HeldOutLoss

Look = Callable[[int, DiffusionPipeline], Inspection]


def at_work(pipeline: DiffusionPipeline, recipe: DenoiserTraining, worker: Worker) -> DiffusionPipeline:
    """The pipeline with which this worker draws and encodes captions: itself on a CPU, else with copies of its frozen parts on the GPU.

    The U-Net is the same object. With bf16 the copied text encoders are in it; the pipeline's own are saved as they were.
    """
    if worker.device.type == "cpu":
        return pipeline
    own, copies = copy.copy(pipeline), {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name != "unet":
            twin = copy.deepcopy(part)
            if recipe.loop.parallel.precision == "bf16" and name.startswith("text_encoder"):
                twin = twin.to(torch.bfloat16)
            copies[name] = twin.to(worker.device)
    own.register_modules(**copies)
    return own


def features_of(pipeline: DiffusionPipeline) -> Callable[[list[str]], TextFeatures]:
    """A function from captions to the features of no caption, first, and of each of them."""
    family, none = family_of(pipeline), family_of(pipeline).unconditional(pipeline)

    def features(captions: list[str]) -> TextFeatures:
        if not captions:
            return none
        found = family.features(pipeline, captions)
        pooled = None
        if found.pooled_BD is not None and none.pooled_BD is not None:
            pooled = torch.cat([none.pooled_BD, found.pooled_BD])
        return TextFeatures(torch.cat([none.tokens_BTD, found.tokens_BTD]), pooled)

    return features


class Looks:
    """The looks that a recipe asks for."""

    def __init__(
        self, recipe: DenoiserTraining, pipeline: DiffusionPipeline, worker: Worker, look: Look | None
    ) -> None:
        """`pipeline` as `at_work` gives it; `look` stands in for the recipe's own."""
        self.recipe, self.pipeline, self.worker, self.look = recipe, pipeline, worker, look
        pipeline.register_modules(unet=pipeline.unet)
        pipeline.set_progress_bar_config(disable=True)
        self.show = None if recipe.samples is None else SampleSheet(recipe.samples, pipeline, worker)

    def without_held_out(self) -> Callable[[int, nn.Module], Inspection] | None:
        """For a streamed set, of which none is held out."""
        if self.look is not None:
            return self._own(self.look)
        if self.recipe.guard is None:
            return None
        if not self.recipe.guard.prompts:
            raise RecipeError(
                "a guard of a streamed set needs prompts or a prompts_file: none of the set's pairs is held out, whose captions it could ask for"
            )
        return self._guard([], None)

    def inspection(
        self, task: DenoiserTask, held_out: list[LatentExamples], captions: list[str]
    ) -> Callable[[int, nn.Module], Inspection] | None:
        """The caller's look, else the guard with the held-out loss beside it, else that loss."""
        if self.look is not None:
            return self._own(self.look)
        loss = None
        if held_out:
            assert self.recipe.stopping is not None
            loss = HeldOutLoss(task, held_out, self.recipe.stopping, self.recipe.loop.seed)
        return loss if self.recipe.guard is None else self._guard(captions, loss)

    def _own(self, look: Look) -> Callable[[int, nn.Module], Inspection]:
        return lambda step, network: look(step, self.pipeline)

    def _guard(self, captions: list[str], loss: HeldOutLoss | None) -> Callable[[int, nn.Module], Inspection]:
        guard = self.recipe.guard
        assert guard is not None
        is_sharded = self.recipe.loop.parallel.sharding == "fsdp" and self.worker.world_size > 1
        if self.worker.rank != 0 and not is_sharded:
            return lambda step, network: Inspection(metrics={})  # rank 0 looks for all
        judge = guard.judge(guard, str(self.worker.device))
        return Guard(guard, judge, self.pipeline, list(guard.prompts) or captions, loss)
