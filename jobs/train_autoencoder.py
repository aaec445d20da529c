"""Trains the autoencoder on the pool's pictures and writes the station `autoencoder`.

reads    ROOT/pool, and ROOT/selection where only kept pictures count
writes   ROOT/autoencoder, a folder that FourierAutoencoder.from_pretrained loads
command  python -m jobs.train_autoencoder stamps
cost     stamps: about 2 minutes on 2 cores; base: about 40; emu: not measured
"""

from __future__ import annotations

from emu_ray.base.recipes import autoencoder_first, autoencoder_second
from emu_ray.config import command_line
from emu_ray.session.on_ray import connect
from emu_ray.training.autoencoder import AutoencoderTraining
from emu_ray.training.autoencoder_run import AutoencoderRun, run_autoencoder
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.on_ray import WorkersRecipe

TWO_CORES = WorkersRecipe(count=2, cpus_each=1)

RECIPES = {
    "base": AutoencoderRun(root="runs/base/autoencoder-1", training=autoencoder_first(), keep_reasons=None),
    "base-sharper": AutoencoderRun(
        root="runs/base/autoencoder-2", training=autoencoder_second(), keep_reasons=None, workers=TWO_CORES
    ),
    "stamps": AutoencoderRun(
        root="runs/stamps",
        training=AutoencoderTraining(
            start="BASE/vae",
            size_px=64,
            kl_weight=2e-4,
            loop=LoopRecipe(
                steps=60, batch_size=16, learning_rate=5e-4, decay="cosine", ema_decay=0.95, log_every_steps=10
            ),
        ),
    ),
    "emu": AutoencoderRun(
        root="runs/emu",
        training=AutoencoderTraining(size_px=256, loop=LoopRecipe(steps=400_000, batch_size=256, learning_rate=1e-4)),
        workers=WorkersRecipe(count=8, use_gpu=True, cpus_each=8, threads_each=8),
    ),
}


def run(recipe: AutoencoderRun) -> None:
    """Train and say how well it reconstructs."""
    connect(int(recipe.workers.use_gpu))
    manifest = run_autoencoder(recipe)
    last = manifest.extra["history"][-1]
    print(
        f"autoencoder: {manifest.extra['steps']} steps, {last['psnr']:.1f} dB on training pictures, at {manifest.station}"
    )


if __name__ == "__main__":
    command_line("train_autoencoder", __doc__ or "", RECIPES, run)
