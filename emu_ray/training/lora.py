"""Low-rank adapters (LoRA, arXiv 2106.09685) of the U-Net: the base is frozen, W + (alpha / rank) B A replaces each targeted W.

peft makes the layers; files are in diffusers' format, for `pipeline.load_lora_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from emu_ray.config import require_at_least
from emu_ray.errors import NumericsError, RecipeError
from emu_ray.models.denoiser import TIME_IDS, conditions, is_micro_conditioned
from emu_ray.models.text import TextFeatures

FUSING_TOLERANCE = 1e-3  # of the largest answer; the two forms round differently


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Rank and scale of the adapters, and which linear layers get one, by the ends of their names."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of every attention

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rank")
        if not self.alpha > 0:
            raise RecipeError(f"alpha of LoraRecipe must be above 0, found {self.alpha}")
        if not self.targets:
            raise RecipeError("targets of LoraRecipe is empty: expected the ends of names of layers, such as to_q")


def require_targets(recipe: LoraRecipe, unet_config: Mapping[str, Any]) -> None:
    """RecipeError unless each target ends the name of at least one linear layer or convolution of a U-Net of this config."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(dict(unet_config))
    names = [name for name, m in network.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in recipe.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise RecipeError(
                f"targets of LoraRecipe: no layer of the U-Net is called {target!r}; such are to_q, to_k, to_v, to_out.0, proj_in, ff.net.0.proj"
            )


def add_adapter(unet: UNet2DConditionModel, recipe: LoraRecipe, seed: int) -> None:
    """Freezes the U-Net and puts an adapter, the same for every rank, beside each target; it answers as before until trained (B = 0)."""
    torch.manual_seed(seed)
    unet.add_adapter(  # peft freezes everything else
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft divides it by the rank
            target_modules=list(recipe.targets),
        )
    )


def save_adapter(pipeline: Any, folder: Path) -> None:
    """Writes `folder`/pytorch_lora_weights.safetensors.

    alpha / rank is multiplied into B, so that the file means the same to every reader, also to one that knows no alpha.
    """
    unet = pipeline.unet
    config = unet.peft_config["default"]
    scale = config.lora_alpha / config.r
    found: dict[str, Tensor] = get_peft_model_state_dict(unet)
    state = {name: value.detach().cpu() * (scale if ".lora_B." in name else 1.0) for name, value in found.items()}
    type(pipeline).save_lora_weights(folder, unet_lora_layers=state, safe_serialization=True)


@torch.no_grad()
def fuse_adapter(unet: UNet2DConditionModel) -> None:
    """Adds the adapters to the weights and removes them; NumericsError when the U-Net then answers otherwise."""
    unet.eval()
    before = _answer(unet)
    unet.fuse_lora()
    unet.unload_lora()
    unet.requires_grad_(True)
    off = (_answer(unet) - before).abs().max() / before.abs().max()
    if not off <= FUSING_TOLERANCE:
        raise NumericsError(
            f"fusing the adapter changed the U-Net's answers by {off.item():.2e} of the largest (at most {FUSING_TOLERANCE:g}): "
            "the adapter's weights may be very large: lower the learning rate"
        )


def _answer(unet: UNet2DConditionModel) -> Tensor:
    """What the U-Net says to one small noisy picture and text."""
    config, seed = unet.config, torch.Generator().manual_seed(0)
    side = 2 ** (len(config.block_out_channels) - 1) * 2
    noisy = torch.randn(1, config.in_channels, side, side, generator=seed)
    tokens = torch.randn(1, 8, config.encoder_hid_dim or config.cross_attention_dim, generator=seed)
    pooled, ids = None, None
    if is_micro_conditioned(unet):
        width = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        pooled, ids = torch.randn(1, width, generator=seed), torch.full((1, TIME_IDS), 512.0)
    told = conditions(TextFeatures(tokens, pooled), ids)
    return unet(noisy, torch.tensor([500]), **told).sample  # type: ignore[no-any-return]
