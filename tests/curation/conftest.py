"""A scores table made of crafted rows, and a real small CLIP with untrained weights in the shipped format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from emu_ray.curation.pair_scorer import EXTRA, SCORES


@pytest.fixture(scope="session")
def make_scores() -> Callable[..., pa.Table]:
    """A function (one dict a row) -> `scores` table; what a dict leaves out is of a pair that every bound keeps."""

    def make(*rows: dict[str, object]) -> pa.Table:
        full = []
        for i, row in enumerate(rows):
            good = {
                "key": i,
                "width_px": 100,
                "height_px": 100,
                "decode_error": "",
                "offensive": 0.0,
                "aesthetic": 8.0,
                "clip_similarity": 0.9,
                "embedding": np.eye(16, dtype=np.float32)[i % 16].tolist(),
                "concept": "ball",
                "phash": f"{(i * 0x9E3779B97F4A7C15) % 2**64:016x}",
                "text_words": 0,
                "text_area": 0.0,
                "gate_reason": "",
                "has_caption": True,
                "image_digest": f"{i:016x}",
                "likes": 0,
            }
            full.append({**good, **row})
        return pa.Table.from_pylist(full, schema=pa.schema([*SCORES, *EXTRA]))

    return make


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
