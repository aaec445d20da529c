"""One call from prompts and seeds to pixels, over any saved pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emu_ray.errors import InputError
from emu_ray.generation.pipeline import EmuPipeline


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are drawn; None for a side means the model's own."""

    steps: int = 25
    guidance: float = 4.0
    height_px: int | None = None
    width_px: int | None = None


class Generator:
    """A loaded checkpoint. Not safe for threads: one call at a time."""

    def __init__(self, checkpoint: str | Path, *, device: str = "cpu") -> None:
        """Loads the diffusers folder `checkpoint`; InputError when it is none."""
        if not (Path(checkpoint) / "model_index.json").exists():
            raise InputError(
                f"{checkpoint} is no model folder: expected a model_index.json in it, as quality_tune and pretrain export"
            )
        self.pipeline = EmuPipeline.load(checkpoint).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def size_px(self) -> int:
        """Side of the images that the model was trained at."""
        return self.pipeline.size_px

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        settings: SamplingSettings,
        negative_prompts: list[str] | None = None,
    ) -> np.ndarray:
        """(N, H, W, 3) uint8, one image a prompt; equal seeds and settings give equal images up to about 1e-6 of a batch's company."""
        out = self.pipeline(
            prompts,
            negative_prompt=negative_prompts or "",
            height=settings.height_px,
            width=settings.width_px,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="np",
        )
        return (out.images * 255 + 0.5).astype(np.uint8)
