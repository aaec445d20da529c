"""Trains the text-to-image model on the ordinary mix: knowledge learning.

reads    ROOT/latents/pretrain; a pipeline folder to start from; emu: ROOT/autoencoder and ROOT/latents/pretrain-256, -512, -1024
writes   ROOT/checkpoints/base, a diffusers folder; emu: also base-256 and base-512 on the way
command  python -m jobs.pretrain demo; python -m jobs.pretrain emu --plan
cost     demo: 0.5 CPU-seconds a step of 48 pictures; emu: `--plan` counts it, not measured

`emu` starts from ROOT/start, the text encoders, tokenizers and scheduler that `python -m jobs.text_encoders emu` writes, and from
ROOT/autoencoder; the U-Net is new, and grows through three sizes. `--plan` prints memory, time and money, and starts nothing.
"""

from __future__ import annotations

from dataclasses import replace

from emu_ray.base.recipes import base_pretraining, base_pretraining_longer
from emu_ray.config import command_line
from emu_ray.models.denoiser import emu
from emu_ray.session.on_ray import connect
from emu_ray.stations import Manifest
from emu_ray.training.denoiser_run import DenoiserRun
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.on_ray import WorkersRecipe
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.progressive import Pretraining, Stage, costs_of, pretrain
from emu_ray.training.samples import SampleSheetRecipe
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.streaming.order import StreamRecipe

TWO_CORES = WorkersRecipe(count=2, cpus_each=1)
SHARDED = ParallelRecipe(
    sharding="fsdp", shard_over=8, precision="bf16"
)  # a copy of the weights a machine of eight GPUs
SHOWN = (
    "a portrait of an old fisherman at dawn", "a bowl of ramen on a wooden table", "a red fox in fresh snow", "mountains behind a lake",
    "a vintage car in a narrow street", "a glass of water on a windowsill", "a lighthouse in a storm", "a market at night",
)  # fmt: skip

RECIPES = {
    "demo": Pretraining(
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
    "stamps": Pretraining(
        root="runs/stamps",
        run="base",
        latents="pretrain",
        training=DenoiserTraining(
            start="BASE",
            autoencoder="ROOT/autoencoder",
            loop=LoopRecipe(steps=60, batch_size=32, learning_rate=1e-3, warmup_steps=10, ema_decay=0.9, log_every_steps=10),
        ),
        workers=TWO_CORES,
    ),
    "base": Pretraining(root="runs/base/pretrain", run="base", latents="pretrain", training=base_pretraining(), workers=TWO_CORES),
    "base-longer": Pretraining(
        root="runs/base/pretrain-longer", run="base", latents="pretrain", training=base_pretraining_longer(), workers=TWO_CORES
    ),
    "emu": Pretraining(
        root="runs/emu",
        run="base-256",
        latents="pretrain-256",
        size_px=256,
        training=DenoiserTraining(
            start="ROOT/start",
            autoencoder="ROOT/autoencoder",
            denoiser=emu(),
            stream=StreamRecipe(),
            loop=LoopRecipe(steps=500_000, batch_size=2048, micro_batch_size=32, learning_rate=1e-4, ema_decay=0.9999, parallel=SHARDED, show_every_images=20_000_000),
            samples=SampleSheetRecipe(prompts=SHOWN),
        ),
        later=(
            Stage(
                run="base-512", latents="pretrain-512", size_px=512,
                loop=LoopRecipe(
                    steps=100_000, batch_size=2048, micro_batch_size=8, learning_rate=5e-5, ema_decay=0.9999, parallel=SHARDED,
                    show_every_images=10_000_000, seed=1,
                ),
            ),
            Stage(
                run="base", latents="pretrain-1024", size_px=1024, noise_offset=0.02,  # the paper's, in the last stage
                loop=LoopRecipe(
                    steps=50_000, batch_size=1024, micro_batch_size=8, learning_rate=2e-5, ema_decay=0.9999,
                    parallel=replace(SHARDED, activation_checkpointing=True), show_every_images=2_000_000, seed=2,
                ),
            ),
        ),
        # as many H100s as cluster/aws.yaml starts; spot machines that are taken away are waited for or done without
        workers=WorkersRecipe(count=32, least=8, use_gpu=True, cpus_each=8, threads_each=8),
    ),
}  # fmt: skip


def run(recipe: Pretraining) -> None:
    """Plan, or train stage after stage and say what was learned from."""
    if recipe.plan:
        print(costs_of(recipe))
        return
    connect(int(recipe.workers.use_gpu))
    pretrain(recipe, _say)


def _say(manifest: Manifest, run: DenoiserRun) -> None:
    extra = manifest.extra
    print(
        f"checkpoints/{run.run}: {extra['steps']} steps, {extra['images_seen']} images seen, {extra['stop_reason']}; {manifest.station}"
    )


if __name__ == "__main__":
    command_line("pretrain", __doc__ or "", RECIPES, run)
