"""Prompts that no training has seen the pictures of, and lists from files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from emu_ray.errors import InputError
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


def file_prompts(path: str, limit: int | None = None) -> tuple[str, ...]:
    """Prompts of a text file, one a line, or of a TSV with a column `Prompt` such as PartiPrompts; InputError for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file of prompts in UTF-8, found {error}") from error
    if path.endswith(".tsv"):
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
        if not rows or "Prompt" not in rows[0]:
            raise InputError(f"{path}: expected a column 'Prompt', found {', '.join(rows[0]) if rows else 'no rows'}")
        lines = [row["Prompt"] for row in rows]
    else:
        lines = text.splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt, found none")
    return tuple(prompts[:limit])
