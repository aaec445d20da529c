"""Sizes for pictures of different shapes: one area, many aspect ratios, as SDXL trains (arXiv 2307.01952, section 2.3)."""

from __future__ import annotations

import math

from emu_ray.errors import RecipeError

Size = tuple[int, int]  # width, height in pixels


def bucket_sizes(size_px: int, max_aspect: float, step_px: int) -> list[Size]:
    """Sizes of about size_px x size_px pixels, sides multiples of `step_px`, longer side at most `max_aspect` times the shorter.

    The square comes first, then wider and higher ones in turn. `max_aspect` 1 gives the square alone. RecipeError when the square
    isn't a multiple of `step_px`.
    """
    if max_aspect < 1:
        raise RecipeError(f"max_aspect must be at least 1, the square alone, found {max_aspect:g}")
    if max_aspect == 1:
        return [(size_px, size_px)]
    if size_px % step_px:
        raise RecipeError(f"size_px must be a multiple of bucket_step_px, found {size_px} and {step_px}")
    found = [(size_px, size_px)]
    short = size_px - step_px
    while short > 0:
        long = round(size_px * size_px / short / step_px) * step_px
        if long / short > max_aspect:
            break
        found += [(long, short), (short, long)]
        short -= step_px
    return found


def nearest(width_px: int, height_px: int, sizes: list[Size]) -> Size:
    """The size whose aspect ratio is nearest, so that least is cropped; of equals the first."""
    ratio = math.log(width_px / height_px)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def name_of(size: Size) -> str:
    """What the station calls a bucket: `1024x768`, width first."""
    return f"{size[0]}x{size[1]}"
