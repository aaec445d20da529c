"""A real diffusion model of two U-Net blocks behind the interface of `emu_ray.generation.Generator`, for HTTP tests.

The prompt enters by its characters' codes; the picture is noise, but its own for every prompt, seed and setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    """The fields of `emu_ray.generation.SamplingSettings`."""

    steps: int = 25
    guidance: float = 4.0
    height_px: int | None = None
    width_px: int | None = None


def save_tiny_pipeline(folder: str) -> None:
    """Write an untrained `DDIMPipeline` (two blocks, 64 px) as a `diffusers` folder."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=64,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)


class TinyGenerator:
    """Thread-unsafe like the real one: two calls at once raise."""

    def __init__(self, checkpoint: str, *, device: str = "cpu") -> None:
        from diffusers import DDIMPipeline

        self._pipeline = DDIMPipeline.from_pretrained(checkpoint).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._is_busy = False

    @property
    def size_px(self) -> int:
        return int(self._pipeline.unet.config.sample_size)

    def generate(
        self, prompts: list[str], seeds: list[int], settings: Any, negative_prompts: list[str] | None = None
    ) -> np.ndarray:
        import torch

        if self._is_busy:
            raise RuntimeError("two calls at once")
        if prompts[0] == "fail":
            raise RuntimeError("the generator broke")
        self._is_busy = True
        try:
            tint = (sum(map(ord, prompts[0])) % 97) / 97 + (0.1 if negative_prompts else 0.0)
            noise = [
                torch.randn(3, settings.height_px, settings.width_px, generator=torch.manual_seed(s)) for s in seeds
            ]
            x = torch.stack(noise) + tint
            scheduler = self._pipeline.scheduler
            scheduler.set_timesteps(settings.steps)
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    x = scheduler.step(self._pipeline.unet(x, t).sample, t, x).prev_sample
            return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        finally:
            self._is_busy = False
