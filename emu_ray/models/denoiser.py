"""The latent U-Net and its presets, in diffusers' own `UNet2DConditionModel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from emu_ray.models.text import TextFeatures

TIME_IDS = 6  # original height and width, top and left of the crop, target height and width, in pixels
TIME_ID_CHANNELS = 256  # of the sinusoidal embedding of each, as in SDXL


@dataclass(frozen=True, kw_only=True)
class DenoiserRecipe:
    """Widths and depths of the U-Net, finest resolution first; attention at the resolutions marked in `attention`.

    `micro_conditioning` tells it each picture's size before scaling, where it was cropped and its bucket (SDXL, arXiv 2307.01952,
    section 2.2), with CLIP's pooled text feature beside them, as SDXL's own U-Net has it.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    attention: tuple[bool, ...]
    heads: tuple[int, ...]
    cross_attention_dim: int
    transformer_layers: int = 1
    norm_num_groups: int = 32
    micro_conditioning: bool = False


def emu() -> DenoiserRecipe:
    """The 2.8 B U-Net of the paper (section 3.1); widths, depths and attention from a sibling's table, see ARCHITECTURE.md."""
    return DenoiserRecipe(
        block_out_channels=(384, 768, 1536, 1536),
        layers_per_block=(3, 4, 4, 4),
        attention=(True, True, True, False),
        heads=(6, 12, 24, 24),  # of width 64
        cross_attention_dim=2560,
        transformer_layers=2,
    )


def demo() -> DenoiserRecipe:
    """2.8 M parameters for 8 x 8 latents: what two CPU cores can train, and a package can carry."""
    return DenoiserRecipe(
        block_out_channels=(64, 96),
        layers_per_block=(1, 1),
        attention=(True, True),
        heads=(2, 3),
        cross_attention_dim=96,
        norm_num_groups=16,
    )


def build(
    recipe: DenoiserRecipe, *, latent_channels: int, latent_side: int, text_width: int, pooled_width: int | None = None
) -> UNet2DConditionModel:
    """A fresh U-Net for latents (B, latent_channels, H, W), trained at latent_side, and text features (B, T, text_width).

    With micro-conditioning also for pooled text features (B, pooled_width).
    """
    extra: dict[str, Any] = {}
    if recipe.micro_conditioning:
        assert pooled_width is not None
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_CHANNELS,
            "projection_class_embeddings_input_dim": pooled_width + TIME_IDS * TIME_ID_CHANNELS,
        }
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in recipe.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(recipe.attention))
    return UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=recipe.block_out_channels,
        layers_per_block=recipe.layers_per_block,
        transformer_layers_per_block=recipe.transformer_layers,
        attention_head_dim=recipe.heads,  # diffusers' name for the number of heads
        cross_attention_dim=recipe.cross_attention_dim,
        encoder_hid_dim=text_width,
        encoder_hid_dim_type="text_proj",
        norm_num_groups=recipe.norm_num_groups,
        **extra,
    )


def is_micro_conditioned(unet: UNet2DConditionModel) -> bool:
    """Whether the U-Net, ours or SDXL's, is told sizes and crops."""
    return bool(unet.config.addition_embed_type == "text_time")


def conditions(text: TextFeatures, time_ids_B6: Tensor | None) -> dict[str, Any]:
    """What a U-Net is called with beside latents and steps; `time_ids_B6` is None for one that isn't told sizes and crops."""
    inputs: dict[str, Any] = {"encoder_hidden_states": text.tokens_BTD}
    if time_ids_B6 is not None:
        inputs["added_cond_kwargs"] = {"text_embeds": text.pooled_BD, "time_ids": time_ids_B6}
    return inputs


def whole_picture_ids(height_px: int, width_px: int, count: int) -> Tensor:
    """(count, 6) time ids of pictures that had the target's size and weren't cropped: what is asked for in sampling, as in diffusers."""
    return torch.tensor([[height_px, width_px, 0, 0, height_px, width_px]]).repeat(count, 1)
