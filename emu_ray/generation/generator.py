"""One call from prompts and seeds to pixels, over any saved pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from emu_ray.generation.base_folder import require_base
from emu_ray.generation.families import family_of


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
        """Loads the diffusers folder `checkpoint`, of any family; InputError when it is none."""
        self.pipeline = require_base(str(checkpoint)).family.load(Path(checkpoint)).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def size_px(self) -> int:
        """Side of the images that the model was trained at."""
        return family_of(self.pipeline).size_px(self.pipeline)

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        settings: SamplingSettings,
        negative_prompts: list[str] | None = None,
    ) -> np.ndarray:
        """(N, H, W, 3) uint8, one image a prompt; equal seeds and settings give equal images up to about 1e-6 of a batch's company.

        Without negative prompts guidance leads away from what the model was trained to take for no caption.
        """
        return draw(self.pipeline, prompts, seeds, settings, negative_prompts, batch_size=len(prompts))


def draw(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: SamplingSettings,
    negative_prompts: list[str] | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """(N, H, W, 3) uint8 of the pipeline as it is, `batch_size` at once; see `Generator.generate`."""
    parts = []
    for at in range(0, len(prompts), batch_size):
        some = slice(at, at + batch_size)
        out = pipeline(
            prompts[some],
            negative_prompt=None if negative_prompts is None else negative_prompts[some],
            height=settings.height_px,
            width=settings.width_px,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(s) for s in seeds[some]],
            output_type="np",
        )
        parts.append((out.images * 255 + 0.5).astype(np.uint8))
    return np.concatenate(parts)
