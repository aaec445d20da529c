"""Checkpoints of random weights, written by diffusers' own classes in exactly the layout of Stable Diffusion 1.5, 2.1 and SDXL 1.0.

Small in every width; images of 64 px from latents of 8 x 8. Each builder writes a folder that plain diffusers loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from emu_ray.generation.families import FAMILIES
from emu_ray.models import small_clip
from emu_ray.training.lora import LoraRecipe, add_adapter, save_adapter

SIDE = 8  # of latents
SIZE_PX = 64
TOKENS = 77
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sd15(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 1.5: epsilon, PNDM, CLIP-L's last layer, convolutions around the attention, a safety checker."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(text_config(hidden_act="quick_gelu")),
        tokenizer=tokenizer(folder, "<|endoftext|>"),
        unet=_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=32,
        ),
        scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **BETAS),
        safety_checker=StableDiffusionSafetyChecker(
            CLIPConfig(
                text_config=text_config().to_dict(),
                vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32, "patch_size": 16},
                projection_dim=8,
            )
        ),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )  # fmt: skip
    return _saved(pipeline, folder)


def sd21(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 2.1: v-prediction, DDIM, OpenCLIP-H without its last layer, linear projections, no safety checker."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(text_config(hidden_act="gelu", num_hidden_layers=1)),
        tokenizer=tokenizer(folder, "!"),
        unet=_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(1, 2),
            cross_attention_dim=32,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=False,
    )  # fmt: skip
    return _saved(pipeline, folder)


def sdxl(folder: Path, seed: int = 0, **index: Any) -> Path:
    """SDXL 1.0 base: epsilon, Euler, two text encoders, sizes and crops."""
    torch.manual_seed(seed)
    second = text_config(hidden_act="gelu", hidden_size=48, num_attention_heads=3, projection_dim=24)
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(text_config(hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer(folder, "<|endoftext|>"),
        tokenizer_2=tokenizer(folder, "!"),
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32 + 48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        add_watermarker=False,
        **index,
    )
    return _saved(pipeline, folder)


BUILDERS: dict[str, Callable[[Path], Path]] = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}


def edit_json(file: Path, **changes: Any) -> None:
    """Changes fields of a folder's JSON; None removes one."""
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    ).eval()


def _vae(scaling_factor: float, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE_PX,
        scaling_factor=scaling_factor,
        **config,
    ).eval()


def text_config(**config: Any) -> CLIPTextConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 8}
    end = small_clip.VOCABULARY - 1
    return CLIPTextConfig(
        vocab_size=small_clip.VOCABULARY,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=1,
        **{**sizes, **config},
    )


def tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """CLIP's with a cut vocabulary, read from the two files that published checkpoints have."""
    files = folder.parent / f"{folder.name}-bpe"
    small_clip.write_config(files)
    ours = small_clip.tokenizer(files)
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (files / "vocab.json").write_text(json.dumps({special.get(token, token): i for token, i in ours.encoder.items()}))
    (files / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in ours.bpe_ranks)]) + "\n")
    return CLIPTokenizer.from_pretrained(files, pad_token=pad_token, model_max_length=TOKENS)


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2"):  # published checkpoints have these two, and not the one file of today
        if (folder / part).is_dir():
            for name in ("vocab.json", "merges.txt"):
                (folder / part / name).write_bytes((folder.parent / f"{folder.name}-bpe" / name).read_bytes())
            (folder / part / "tokenizer.json").unlink(missing_ok=True)
    edit_json(folder / "scheduler" / "scheduler_config.json", _diffusers_version="0.6.0")
    return folder


def lora_of(base: Path, folder: Path) -> Path:
    """Writes an adapter of a Stable Diffusion base into `folder`; it was trained, so to say: its B is not zero."""
    pipeline = FAMILIES["StableDiffusionPipeline"].load(base)
    add_adapter(pipeline.unet, LoraRecipe(rank=2), seed=0)
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    save_adapter(pipeline, folder)
    return folder
