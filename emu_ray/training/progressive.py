"""Pretraining at growing resolution as one run: each stage goes on from the weights of the one before, on latents of its own size.

Emu trains at progressively higher resolution and adds a noise offset of 0.02 in the last stage (arXiv 2309.15807, section 3.1); sizes and
steps of the stages are our choice. A stage is a checkpoint station like any other, so a run that was stopped goes on in its stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError
from emu_ray.stations import Manifest, Station
from emu_ray.training.denoiser_run import DenoiserRun, placed, require_shapes, require_workers, run_denoiser
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.plan import PlanRecipe, Stretch, told
from emu_ray.training.streaming.scan import scan_latents


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A later stage: what it changes of the one before."""

    run: str
    latents: str
    size_px: int  # of the plan; what is trained on is what the latents are
    loop: LoopRecipe
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "size_px")


@dataclass(frozen=True, kw_only=True)
class Pretraining(DenoiserRun):
    """A first stage, and those that follow it; the last one's checkpoint is the result."""

    size_px: int = 64  # of the first stage, for the plan
    later: tuple[Stage, ...] = ()
    plan: bool = field(default=False, metadata={"affects_result": False})  # print what it will need, and start nothing
    planning: PlanRecipe = field(default=PlanRecipe(), metadata={"affects_result": False})

    def __post_init__(self) -> None:
        names = [self.run, *(stage.run for stage in self.later)]
        if len(set(names)) != len(names):
            raise RecipeError(
                f"each stage writes a checkpoint of its own: expected different names of run, found {', '.join(names)}"
            )


def stages(recipe: Pretraining) -> list[DenoiserRun]:
    """One run a stage: the first as it is, each other from the checkpoint of the one before."""
    known = {name: getattr(recipe, name) for name in DenoiserRun.__dataclass_fields__}
    found = [DenoiserRun(**known)]
    for stage in recipe.later:
        stream = found[-1].training.stream
        if stream is not None and stream.encode is not None:
            stream = replace(stream, encode=replace(stream.encode, size_px=stage.size_px))
        training = replace(
            found[-1].training,
            start=f"ROOT/checkpoints/{found[-1].run}",
            autoencoder=None,
            denoiser=None,
            loop=stage.loop,
            noise_offset=stage.noise_offset,
            stream=stream,
        )
        found.append(replace(found[-1], run=stage.run, latents=stage.latents, training=training))
    return found


def pretrain(
    recipe: Pretraining, each: Callable[[Manifest, DenoiserRun], None] = lambda manifest, run: None
) -> Manifest:
    """Every stage in turn; finished ones do nothing. `each` is told of every stage as it ends."""
    runs = stages(recipe)
    _require_later(runs)
    for run in runs:
        manifest = run_denoiser(run)
        each(manifest, run)
    return manifest


def _require_later(runs: list[DenoiserRun]) -> None:
    """What a later stage lacks, said before the first takes weeks: its start isn't there yet, its autoencoder is the first one's."""
    first, _ = placed(runs[0].training, runs[0].root)
    for run in runs[1:]:
        require_workers(run)
        if run.training.stream is None or run.training.stream.encode is None:
            station = Station(f"{run.root}/latents/{run.latents}")
            station.require("latents")
            require_shapes(station, scan_latents(station), replace(run.training, autoencoder=first.vae))


def costs_of(recipe: Pretraining) -> str:
    """What all stages will need, as lines for a terminal; RecipeError when the U-Net isn't the recipe's own."""
    denoiser = recipe.training.denoiser
    if denoiser is None:
        raise RecipeError(
            "--plan counts a U-Net that the recipe builds: expected a denoiser in the training, found one that is taken over; plan with the recipe that made it"
        )
    sizes = [recipe.size_px, *(stage.size_px for stage in recipe.later)]
    stretches = [
        Stretch(
            name=run.run,
            size_px=size_px,
            images=run.training.loop.steps * run.training.loop.batch_size,
            batch_size=run.training.loop.batch_size,
            workers=run.workers.count,
            parallel=run.training.loop.parallel,
            micro_batch_size=run.training.loop.micro_batch_size,
        )
        for run, size_px in zip(stages(recipe), sizes, strict=True)
    ]
    return told(denoiser, stretches, recipe.planning)
