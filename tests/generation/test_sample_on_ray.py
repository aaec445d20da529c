"""The samples station on a real local Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emu_ray.errors import InputError
from emu_ray.generation import Generator, SamplingSettings
from emu_ray.generation.on_ray import SampleRecipe, sample
from emu_ray.generation.samples import from_png
from emu_ray.stations import Station

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow]


def test_pictures_are_those_of_the_prompt_and_seed_whatever_the_batches(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\na green ball\n", encoding="utf-8")
    settings = SamplingSettings(steps=2, guidance=2.0)
    recipe = SampleRecipe(
        root=str(tmp_path),
        run="base",
        checkpoint=str(checkpoint),
        prompts_file=str(tmp_path / "prompts.txt"),
        settings=settings,
        batch_size=2,
        actors=1,
    )
    assert sample(recipe).rows == 3
    rows = Station(tmp_path / "samples" / "base").read_table()
    assert rows["seed"].to_pylist() == [1000, 1001, 1002]
    alone = Generator(checkpoint).generate(["a green ball"], [1002], settings)[0]
    assert np.abs(from_png(rows["image"][2].as_py()).astype(int) - alone).max() <= 1
    sample(recipe)  # finished before: nothing to do


def test_no_prompts_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompts to draw"):
        sample(SampleRecipe(root=str(tmp_path), run="base", checkpoint="nowhere"))
