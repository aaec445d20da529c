"""The frozen encoders as a station, from folders in the hub's own layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import InputError
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models.text import TextEncoderSource
from emu_ray.stations import Station
from jobs.text_encoders import TextEncodersRecipe, run


def source(root: Path, pipeline: EmuPipeline) -> TextEncoderSource:
    for name, parts in {"clip": ("text_encoder", "tokenizer"), "t5": ("text_encoder_2", "tokenizer_2")}.items():
        for part in parts:
            getattr(pipeline, part).save_pretrained(root / name)
    return TextEncoderSource(clip=str(root / "clip"), t5=str(root / "t5"), clip_tokens=20, t5_tokens=13)


def test_start_holds_both_encoders_the_schedule_and_how_many_tokens_are_read(
    pipeline: EmuPipeline, tmp_path: Path
) -> None:
    recipe = TextEncodersRecipe(root=str(tmp_path), encoders=source(tmp_path / "hub", pipeline))
    run(recipe)
    start = tmp_path / "start"
    assert Station(start).require("start").files
    pipeline.vae.save_pretrained(start / "vae")
    loaded = EmuPipeline.load(start, pipeline.unet)
    assert loaded.texts(["a ball"]).shape == (1, 20 + 13, loaded.texts.width)
    expected = NoiseSchedule(ScheduleRecipe()).scheduler()
    assert torch.equal(loaded.scheduler.alphas_cumprod, expected.alphas_cumprod)
    run(recipe)  # finished before: nothing to do


def test_encoders_that_cannot_be_had_are_one_sentence(tmp_path: Path) -> None:
    recipe = TextEncodersRecipe(root=str(tmp_path), encoders=TextEncoderSource(clip=str(tmp_path), t5=str(tmp_path)))
    with pytest.raises(InputError, match="can't load the text encoders") as raised:
        run(recipe)
    assert "\n" not in str(raised.value)
