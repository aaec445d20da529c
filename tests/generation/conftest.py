"""A whole pipeline of random weights, as small as its parts allow."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from transformers import T5EncoderModel

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models import small_clip, small_t5
from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder
from emu_ray.models.denoiser import DenoiserRecipe, build


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> EmuPipeline:
    """Makes images of 16 px from latents of 4 x 4."""
    folder = tmp_path_factory.mktemp("clip")
    small_clip.write_config(folder)
    small_clip.register(folder)
    torch.manual_seed(0)
    tower, tokenizer = small_clip.hf_text_tower(open_clip.create_model(small_clip.NAME).eval(), folder)
    t5_tokenizer = small_t5.train_tokenizer(["a photo of a red metal ball in a meadow"])
    t5 = T5EncoderModel(small_t5.build(len(t5_tokenizer)).config).eval()
    vae = FourierAutoencoder.build(
        AutoencoderRecipe(
            latent_channels=4, space_to_depth=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
        )
    )
    sizes = DenoiserRecipe(
        block_out_channels=(8, 16),
        layers_per_block=(1, 1),
        attention=(True, True),
        heads=(1, 2),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    unet = build(sizes, latent_channels=4, latent_side=4, text_width=small_clip.TEXT_WIDTH + 64)
    scheduler = NoiseSchedule(ScheduleRecipe()).scheduler()
    return EmuPipeline(
        vae=vae.eval(), text_encoder=tower, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=t5_tokenizer, unet=unet.eval(), scheduler=scheduler
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(pipeline: EmuPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    pipeline.save_pretrained(folder)
    return folder
