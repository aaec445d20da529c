"""Trains the autoencoder on the pool's pictures and writes the station `autoencoder`.

reads    ROOT/pool, and ROOT/selection where only kept pictures count
writes   ROOT/autoencoder, or ROOT/autoencoders/NAME for those of Table 1: folders that `load_autoencoder` reads
command  python -m jobs.train_autoencoder stamps
cost     stamps: about 2 minutes on 2 cores; base: about 40; table1-*: 3 to 4 each on one core, and 1 to 2 with a discriminator; emu: not measured

The autoencoders of the paper's Table 1 are `emu-4`, `emu-8`, `emu-16` and `emu` (16 channels behind the Fourier transform), and in the demo's
size `table1-4` .. `table1-fourier16`, which `table1-NAME-adversarial` train on against a discriminator. They differ in channels and transform
alone. LPIPS joins the losses with --training.perceptual FILE (VGG-16's weights in torchvision's layout, or timm/vgg16.tv_in1k).
"""

from __future__ import annotations

from dataclasses import replace

from emu_ray.base.recipes import autoencoder_first, autoencoder_second, autoencoder_sizes
from emu_ray.config import command_line
from emu_ray.models.autoencoder import AutoencoderRecipe
from emu_ray.models.discriminator import DiscriminatorRecipe
from emu_ray.session.on_ray import connect
from emu_ray.training.autoencoder import AutoencoderTraining
from emu_ray.training.autoencoder_run import AutoencoderRun, run_autoencoder
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.on_ray import WorkersRecipe
from emu_ray.training.reconstruction import AdversarialRecipe
from emu_ray.training.streaming.order import StreamRecipe

TWO_CORES = WorkersRecipe(count=2, cpus_each=1)
TABLE_1 = {"4": (4, 0), "8": (8, 0), "16": (16, 0), "fourier16": (16, 2)}  # latent channels, Fourier frequencies


def _emu(name: str, channels: int, frequencies: int) -> AutoencoderRun:
    return AutoencoderRun(
        root="runs/emu",
        name=name,
        training=AutoencoderTraining(
            size_px=256,
            stream=StreamRecipe(),
            network=AutoencoderRecipe(latent_channels=channels, fourier_frequencies=frequencies),
            adversarial=AdversarialRecipe(),
            loop=LoopRecipe(steps=400_000, batch_size=256, learning_rate=1e-4),
        ),
        held_out_every=100,
        workers=WorkersRecipe(count=8, use_gpu=True, cpus_each=8, threads_each=8),
    )


def _table1(name: str) -> AutoencoderRun:
    """Small enough for one core: half the base's widths, pictures of 32 px. At 64 px the channels don't matter within minutes: EXPERIMENTS.md."""
    channels, frequencies = TABLE_1[name]
    sizes = replace(
        autoencoder_sizes(), latent_channels=channels, fourier_frequencies=frequencies, block_out_channels=(32, 64)
    )
    return AutoencoderRun(
        root="runs/table1",
        name=f"autoencoders/{name}",
        training=AutoencoderTraining(
            size_px=32,
            network=sizes,
            kl_weight=2e-4,
            loop=LoopRecipe(
                steps=4000,
                batch_size=16,
                learning_rate=2e-3,
                decay="cosine",
                weight_decay=1e-4,
                ema_decay=0.995,
                seed=301,
            ),
        ),
        keep_reasons=None,
        held_out_every=8,
    )


def _table1_adversarial(name: str) -> AutoencoderRun:
    """The second leg: on from the first, against a discriminator from its first step."""
    first = _table1(name)
    return replace(
        first,
        name=f"{first.name}-adversarial",
        training=replace(
            first.training,
            start=f"ROOT/{first.name}",
            adversarial=AdversarialRecipe(
                start_step=0, discriminator=DiscriminatorRecipe(width=16, halvings=2, norm_num_groups=8)
            ),
            loop=replace(first.training.loop, steps=1000, learning_rate=5e-4, seed=302),
        ),
    )


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
    "emu": _emu("autoencoder", 16, 2),
    **{f"emu-{name}": _emu(f"autoencoders/{name}", *TABLE_1[name]) for name in ("4", "8", "16")},
    **{f"table1-{name}": _table1(name) for name in TABLE_1},
    **{f"table1-{name}-adversarial": _table1_adversarial(name) for name in TABLE_1},
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
