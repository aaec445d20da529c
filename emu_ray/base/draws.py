"""The separate draws of the haystack, and captions as the web would write them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from emu_ray.haystack.defects import offensive_badge, overlay_text
from emu_ray.haystack.render import render
from emu_ray.haystack.world import SceneBatch, captions, draw_scenes

SEEDS = {
    "clip": 101,
    "autoencoder": 201,
    "pretrain": 202,
    "autoencoder_sharper": 204,
    "pretrain_longer": 205,
    "ratings": 301,
    "faithfulness_judge": 401,
    "judge_check": 402,
    "pool": 501,
    "prompts": 601,
}
CANVAS_PX = 96  # pools hold pictures of this side; networks see them at 64
SIZE_PX = 64  # the side at which the base's networks learn
AUTOENCODER_PICTURES = 16_384
PRETRAIN_PICTURES = 24_000
PRETRAIN_LONGER_PICTURES = 48_000


@dataclass(frozen=True)
class WebDraw:
    """Pictures (N, side, side, 3) uint8 with alt-text captions, and which carry a badge or overlaid text."""

    scenes: SceneBatch
    images: np.ndarray
    captions: list[str]
    badge: np.ndarray
    text: np.ndarray


def web_draw(seed: int, count: int, side_px: int, *, flawed_share: float = 0.1) -> WebDraw:
    """A draw with badges and text on `flawed_share` of the pictures each; half of such captions mention it, as alt texts do.

    A part of the captions praises or blames the picture, so that CLIP hears words of quality; the denoiser's captions never do.
    """
    rng = np.random.default_rng([seed])
    scenes = draw_scenes(rng, count)
    large = render(scenes, CANVAS_PX)
    badge, text = rng.random(count) < flawed_share, rng.random(count) < flawed_share
    lines = captions(scenes)
    met = scenes.criteria.sum(axis=1)
    for i in range(count):
        if badge[i]:
            large[i] = offensive_badge(large[i], rng)
        if text[i]:
            large[i] = overlay_text(large[i], rng)
        if rng.random() < 0.5:
            lines[i] = _praise(lines[i], int(met[i]))
        if badge[i] and rng.random() < 0.5:
            lines[i] += " with a forbidden sign"
        elif text[i] and rng.random() < 0.5:
            lines[i] += " with text"
    return WebDraw(scenes, shrink(large, side_px), lines, badge, text)


def shrink(images: np.ndarray, side_px: int) -> np.ndarray:
    """(N, H, W, 3) uint8 to side_px by Pillow's bicubic filter, as CLIP's own transform does."""
    if images.shape[1] == side_px:
        return images
    return np.stack(
        [np.asarray(Image.fromarray(i).resize((side_px, side_px), Image.Resampling.BICUBIC)) for i in images]
    )


def _praise(caption: str, criteria_met: int) -> str:
    bare = caption.removeprefix("a photo of ").removeprefix("a picture of ")
    word = {4: "a beautiful photo of ", 3: "a nice photo of ", 2: "a snapshot of "}.get(criteria_met, "a bad photo of ")
    return word + bare
