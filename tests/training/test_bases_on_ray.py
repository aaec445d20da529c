"""The way of a published base through the jobs' own functions, on a real local Ray: encode, quality-tune, sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from emu_ray.encoding.on_ray import encode
from emu_ray.errors import InputError
from emu_ray.generation import SamplingSettings
from emu_ray.generation.on_ray import sample
from emu_ray.generation.samples import from_png
from emu_ray.records import ORIGIN, SCHEMAS
from emu_ray.stations import Station
from emu_ray.training.denoiser_run import run_denoiser
from emu_ray.training.on_ray import WorkersRecipe
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.stopping import StoppingRecipe
from jobs.encode import RECIPES as ENCODE
from jobs.quality_tune import RECIPES as TUNE
from jobs.sample import RECIPES as SAMPLE
from tests.generation.small_bases import SIZE_PX, edit_json, sd15, sdxl

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow, pytest.mark.timeout(1800)]
PAIRS = 10


def _choose(root: Path, picture: Callable[..., bytes]) -> None:
    station = Station(root / "chosen")
    station.begin("by hand", "{}", "chosen", {})
    columns = {
        "key": range(PAIRS),
        "image": [picture(i, 96, 64) for i in range(PAIRS)],
        "caption": [f"a photo of ball {i}" for i in range(PAIRS)],
        "votes": [[1.0]] * PAIRS,
        "annotator": ["us"] * PAIRS,
    }
    station.write_table(
        "part-000000.parquet", pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMAS["chosen"]})
    )
    station.finish()


@pytest.mark.parametrize(
    ("recipe", "build", "cls", "run", "parallel"),
    [
        ("sd15", sd15, StableDiffusionPipeline, "tuned", ParallelRecipe()),
        ("sdxl-lora", sdxl, StableDiffusionXLPipeline, "lora", ParallelRecipe(sharding="fsdp")),
    ],
)
def test_a_base_is_encoded_tuned_and_sampled_by_the_jobs_recipes(
    recipe: str,
    build: Callable[[Path], Path],
    cls: type,
    run: str,
    parallel: ParallelRecipe,
    noise_picture: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    root, base = str(tmp_path), recipe.split("-")[0]
    build(tmp_path / "start")
    _choose(tmp_path, noise_picture)
    encode(replace(ENCODE[f"{base}-quality"], root=root, size_px=SIZE_PX, num_gpus=0, num_cpus=1))
    latents = Station(tmp_path / "latents" / "quality").read_table()
    assert [latents[name][0].as_py() for name in ORIGIN] == [96, 64, 16, 0]

    tuning = TUNE[recipe]
    loop = replace(
        tuning.training.loop,
        parallel=parallel,
        steps=4,
        batch_size=4,
        learning_rate=1e-2,
        inspect_every_steps=2,
        checkpoint_every_steps=2,
    )
    training = replace(tuning.training, loop=loop, stopping=StoppingRecipe(held_out=0.2, draws=2))
    tuning = replace(tuning, root=root, training=training, workers=WorkersRecipe(count=2, cpus_each=1))
    manifest = run_denoiser(tuning)
    assert manifest.extra["steps"] == 4 and len(manifest.extra["inspections"]) == 2
    folder = tmp_path / "checkpoints" / run
    assert (folder / "pytorch_lora_weights.safetensors").exists() == (run == "lora")
    plain = cls.from_pretrained(folder, safety_checker=None)  # type: ignore[attr-defined]
    plain.set_progress_bar_config(disable=True)
    settings = SamplingSettings(steps=2, guidance=2.0)
    sampling = replace(
        SAMPLE[f"{base}-{run}"], root=root, prompts=("a ball", "a cube"), settings=settings, num_gpus=0, num_cpus=1
    )
    sample(sampling)
    drawn = from_png(Station(tmp_path / "samples" / run).read_table()["image"].to_pylist())
    theirs = plain(
        "a cube",
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1001),
        output_type="np",
    ).images
    assert np.abs(np.round(theirs[0] * 255) - drawn[1]).max() <= 1


def test_a_start_that_is_no_base_ends_the_job_before_a_worker_starts(
    noise_picture: Callable[..., bytes], tmp_path: Path
) -> None:
    sd15(tmp_path / "start")
    _choose(tmp_path, noise_picture)
    edit_json(tmp_path / "start" / "unet" / "config.json", in_channels=9)
    with pytest.raises(InputError, match="an inpainting model"):
        run_denoiser(replace(TUNE["sd15"], root=str(tmp_path)))
    assert not (tmp_path / "ray_train").exists()
