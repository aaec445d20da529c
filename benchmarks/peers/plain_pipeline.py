"""Diffusers' pipeline as the peers of benchmarks/serving.py call it: one torch thread, guidance 4, a generator for each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image

GUIDANCE = 4.0


def load(folder: str) -> StableDiffusionPipeline:
    """The folder's pipeline, silent."""
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], seeds: list[int], steps: int, **more: Any
) -> list[Image]:
    """One picture a prompt, all in one call."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images: list[Image] = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, **more
    ).images
    return images


def draw_batch(pipeline: StableDiffusionPipeline, asked: Sequence[tuple[str, int, int]]) -> list[Image]:
    """The pictures of (prompt, seed, steps), in their order: one call for each number of steps, for all rows of a call make the same steps."""
    found: dict[int, Image] = {}
    for steps in sorted({one[2] for one in asked}):
        rows = [i for i, one in enumerate(asked) if one[2] == steps]
        images = draw(pipeline, [asked[i][0] for i in rows], [asked[i][1] for i in rows], steps)
        found.update(zip(rows, images, strict=True))
    return [found[i] for i in range(len(asked))]
