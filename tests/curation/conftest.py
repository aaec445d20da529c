"""A scores table made of crafted rows, and a real small CLIP with untrained weights in the shipped format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clip/ (the small CLIP, random weights of a fixed seed) and heads/ of random directions."""
    import open_clip
    from safetensors.torch import save_file

    from emu_ray.curation.heads import LinearHead
    from emu_ray.models import small_clip

    folder = tmp_path_factory.mktemp("untrained")
    small_clip.write_config(folder / "clip")
    small_clip.register(folder / "clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(small_clip.NAME)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "clip" / "open_clip_model.safetensors")
        for name, kind in (("aesthetic", "score"), ("offensive", "probability")):
            head = LinearHead(96, kind)  # type: ignore[arg-type]
            torch.nn.init.normal_(head.weight)
            torch.nn.init.constant_(head.bias, 5.0 if kind == "score" else 0.0)
            head.save(folder / "heads" / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def lettered() -> Callable[[str], np.ndarray]:
    """A function (word) -> (96, 96, 3) uint8 with the word across a plain picture; "" gives the picture alone."""

    def draw(word: str) -> np.ndarray:
        from PIL import ImageDraw, ImageFont

        picture = Image.new("RGB", (96, 96), (40, 90, 160))
        if word:
            font = ImageFont.load_default(size=22)
            pen = ImageDraw.Draw(picture)
            pen.text((6, 36), word, font=font, fill=(255, 255, 255), stroke_width=1, stroke_fill=(10, 10, 10))
        return np.asarray(picture)

    return draw
