"""A pipeline of none of our families, as small as its parts allow."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5EncoderModel

from emu_ray.models import small_t5


def small_pixart(folder: Path) -> Path:
    """PixArt, a transformer with T5: images of 16 px from latents of 8 x 8."""
    torch.manual_seed(0)
    tokenizer = small_t5.train_tokenizer(["a photo of a red metal ball in a meadow"])
    tokenizer.model_max_length = 16
    t5 = T5EncoderModel(small_t5.build(len(tokenizer)).config).eval()
    PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        transformer=PixArtTransformer2DModel(
            sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=t5.config.d_model,
            in_channels=4, out_channels=8, use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder
