"""How the base was made: the recipes of `jobs.make_base`, figures in EXPERIMENTS.md.

The demo continues from these weights; like Emu's, the base is pretrained on the ordinary mix, of which 1 in 10 is photogenic.
"""

from __future__ import annotations

from emu_ray.base.draws import SIZE_PX
from emu_ray.diffusion.schedule import ScheduleRecipe
from emu_ray.models.autoencoder import AutoencoderRecipe
from emu_ray.models.denoiser import demo
from emu_ray.training.autoencoder import AutoencoderTraining
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.start import DenoiserTraining

CLIP_PAIRS = 20_000
CLIP_LOOP = LoopRecipe(
    steps=1400, batch_size=192, learning_rate=1e-3, decay="cosine", weight_decay=0.05, adam_beta2=0.98, ema_decay=0.995,
    log_every_steps=25, checkpoint_every_steps=200, seed=101,
)  # fmt: skip
T5_CAPTIONS = 16384
T5_LOOP = LoopRecipe(
    steps=1500,
    batch_size=64,
    learning_rate=3e-3,
    decay="cosine",
    weight_decay=0.0,
    ema_decay=None,
    log_every_steps=300,
    seed=101,
)


def autoencoder_sizes() -> AutoencoderRecipe:
    """1.7 M parameters: a fixed space-to-depth of 4 leaves one learned halving, so no layer works at full resolution."""
    return AutoencoderRecipe(
        space_to_depth=4, block_out_channels=(64, 96), layers_per_block=1, norm_num_groups=16, mid_block_attention=False
    )


def _autoencoder_loop(steps: int, batch_size: int, seed: int) -> LoopRecipe:
    return LoopRecipe(
        steps=steps, batch_size=batch_size, learning_rate=1.5e-3, decay="cosine", weight_decay=1e-4, ema_decay=0.998,
        log_every_steps=50, checkpoint_every_steps=200, seed=seed,
    )  # fmt: skip


def autoencoder_first() -> AutoencoderTraining:
    """Coarse shapes and colours, on the ordinary mix."""
    return AutoencoderTraining(
        loop=_autoencoder_loop(2000, 16, 201), size_px=SIZE_PX, network=autoencoder_sizes(), kl_weight=1e-3
    )


def autoencoder_second(start: str = "runs/base/autoencoder-1/autoencoder") -> AutoencoderTraining:
    """Edges and textures: at least half of the pictures photogenic, since noise and clutter teach little, and a weaker prior."""
    return AutoencoderTraining(loop=_autoencoder_loop(6000, 32, 202), size_px=SIZE_PX, start=start, kl_weight=2e-4)


def base_pretraining(start: str = "runs/base/parts") -> DenoiserTraining:
    """A fresh U-Net on the ordinary mix: places, colours and scenes."""
    return DenoiserTraining(
        start=start,
        denoiser=demo(),
        schedule=ScheduleRecipe(min_snr_gamma=5.0),
        loop=LoopRecipe(
            steps=4500, batch_size=48, learning_rate=1.5e-3, warmup_steps=300, decay="cosine", weight_decay=1e-3, ema_decay=0.998,
            log_every_steps=50, checkpoint_every_steps=250, seed=203,
        ),
    )  # fmt: skip


def base_pretraining_longer(start: str = "runs/base/pretrain/checkpoints/base") -> DenoiserTraining:
    """The same U-Net on a larger draw, all noise levels weighted alike: shapes and materials, which are decided where the noise is strong."""
    return DenoiserTraining(
        start=start,
        loop=LoopRecipe(
            steps=12_000, batch_size=48, learning_rate=1.2e-3, warmup_steps=300, decay="cosine", weight_decay=1e-3, ema_decay=0.999,
            log_every_steps=50, checkpoint_every_steps=250, seed=205,
        ),
    )  # fmt: skip
