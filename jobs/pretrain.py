"""Trains the text-to-image model on the ordinary mix: knowledge learning.

reads    ROOT/latents/pretrain; a pipeline folder to start from; emu: ROOT/autoencoder
writes   ROOT/checkpoints/base, a diffusers folder
command  python -m jobs.pretrain demo
cost     demo: 0.5 CPU-seconds a step of 48 pictures; emu: not measured

`emu` starts from ROOT/start, the text encoders, tokenizers and scheduler that `python -m jobs.text_encoders emu` writes, and from
ROOT/autoencoder; the U-Net is new.
"""

from __future__ import annotations

from emu_ray.base.recipes import base_pretraining, base_pretraining_longer
from emu_ray.config import command_line
from emu_ray.models.denoiser import emu
from emu_ray.session.on_ray import connect
from emu_ray.training.denoiser import DenoiserTraining
from emu_ray.training.denoiser_run import DenoiserRun, run_denoiser
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.on_ray import WorkersRecipe

TWO_CORES = WorkersRecipe(count=2, cpus_each=1)

RECIPES = {
    "demo": DenoiserRun(
        root="runs/demo",
        run="base",
        latents="pretrain",
        training=DenoiserTraining(
            start="BASE",
            noise_offset=0.02,  # as in Emu's last stage of pretraining
            loop=LoopRecipe(
                steps=100, batch_size=48, learning_rate=2e-4, warmup_steps=20, ema_decay=0.98, seed=801,
                log_every_steps=10, checkpoint_every_steps=50,
            ),
        ),
        workers=TWO_CORES,
    ),
    "stamps": DenoiserRun(
        root="runs/stamps",
        run="base",
        latents="pretrain",
        training=DenoiserTraining(
            start="BASE",
            loop=LoopRecipe(steps=60, batch_size=32, learning_rate=1e-3, warmup_steps=10, ema_decay=0.9, log_every_steps=10),
        ),
        workers=TWO_CORES,
    ),
    "base": DenoiserRun(root="runs/base/pretrain", run="base", latents="pretrain", training=base_pretraining(), workers=TWO_CORES),
    "base-longer": DenoiserRun(
        root="runs/base/pretrain-longer", run="base", latents="pretrain", training=base_pretraining_longer(), workers=TWO_CORES
    ),
    "emu": DenoiserRun(
        root="runs/emu",
        run="base",
        latents="pretrain",
        training=DenoiserTraining(
            start="ROOT/start",
            autoencoder="ROOT/autoencoder",
            denoiser=emu(),
            loop=LoopRecipe(steps=500_000, batch_size=2048, learning_rate=1e-4, ema_decay=0.9999),
        ),
        # as many H100s as cluster/aws.yaml starts
        workers=WorkersRecipe(count=32, use_gpu=True, cpus_each=8, threads_each=8),
    ),
}  # fmt: skip


def run(recipe: DenoiserRun) -> None:
    """Train and say what was learned from."""
    connect(int(recipe.workers.use_gpu))
    manifest = run_denoiser(recipe)
    extra = manifest.extra
    print(
        f"checkpoints/{recipe.run}: {extra['steps']} steps, {extra['images_seen']} images seen, {extra['stop_reason']}; {manifest.station}"
    )


if __name__ == "__main__":
    command_line("pretrain", __doc__ or "", RECIPES, run)
