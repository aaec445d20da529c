"""Prompts whose contents no training has shown."""

from __future__ import annotations

import numpy as np

from emu_ray.haystack.world import captions, draw_scenes, reserved


def haystack_prompts(count: int, seed: int = 601) -> tuple[str, ...]:
    """`count` distinct captions of contents that no denoiser's pool shows (`haystack.world.reserved`), from a draw of its own."""
    rng = np.random.default_rng([seed])
    found: dict[str, None] = {}
    while len(found) < count:
        scenes = draw_scenes(rng, 16 * count)
        for line in captions(scenes.take(reserved(scenes))):
            bare = line.removeprefix("a photo of ").removeprefix("a picture of ")
            found.setdefault(f"a photo of {bare}")
    return tuple(list(found)[:count])
