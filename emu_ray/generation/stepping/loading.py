"""A folder to the engine that draws with it: step by step for our families, in whole calls for any other pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from emu_ray.errors import InputError
from emu_ray.generation.base_folder import INDEX, require_base
from emu_ray.generation.families import FAMILIES
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.tickets import AnyEngine, Watcher
from emu_ray.generation.stepping.turns import Turns
from emu_ray.generation.stepping.whole import WholeEngine, load_whole
from emu_ray.models.hub import read_json

Dtype = Literal["float32", "bfloat16", "float16"]
TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """An adapter of a model's U-Net: a folder with pytorch_lora_weights.safetensors."""

    folder: Path
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where models are put, what they share there, and in what precision the U-Net and the text encoders compute."""

    device: str = "cpu"
    dtype: Dtype = "float32"  # our families' autoencoders stay in float32: in half of it SDXL's overflows
    cuda_graphs: bool = True  # on a GPU: passes are recorded and replayed
    turns: Turns = field(default_factory=Turns)
    watcher: Watcher = field(default_factory=Watcher)


def load_engine(
    folder: Path,
    loras: Mapping[str, Lora],
    placement: Placement,
    *,
    without_texts: bool = False,
    failed: Callable[[str, InputError], None] | None = None,
) -> AnyEngine:
    """An engine for the model and its adapters; InputError in one sentence for a folder that can't be loaded, `failed` told of an adapter.

    `without_texts` leaves the text encoders where they are: `Engine.submit` is then given what they say.
    """
    if pipeline_name(folder) not in FAMILIES:
        pipeline = load_whole(folder).to(placement.device, getattr(torch, placement.dtype))
        return WholeEngine(pipeline, turns=placement.turns, watcher=placement.watcher)
    base = require_base(str(folder))
    pipeline = base.family.load(folder, without=TEXT_PARTS if without_texts else ())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(placement.device)
    for part in ("unet", *TEXT_PARTS):
        if (network := getattr(pipeline, part, None)) is not None:
            network.to(getattr(torch, placement.dtype))
    model = SteppedModel(pipeline, placement.cuda_graphs)
    for name, lora in loras.items():
        try:
            model.add_lora(name, lora.folder, lora.scale)
        except InputError as error:
            if failed is None:
                raise
            failed(name, error)
    return Engine(model, turns=placement.turns, watcher=placement.watcher)


def pipeline_name(folder: Path) -> str:
    """The class that the folder's index names."""
    named = read_json(folder / INDEX).get("_class_name")
    return str(named[-1] if isinstance(named, list) and named else named)
