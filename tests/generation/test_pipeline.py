"""A saved folder loads by either door, and an image depends on its own prompt and seed alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_ray.errors import InputError
from emu_ray.generation import EmuPipeline, Generator, SamplingSettings

PROMPTS = ["a photo of a red metal ball in a meadow", "two cubes", ""]
FAST = SamplingSettings(steps=3, guidance=3.0)


def _draw(pipeline: EmuPipeline, prompts: list[str], seeds: list[int], **settings: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(s) for s in seeds]
    return pipeline(prompts, generator=noise, num_inference_steps=3, output_type="np", **settings).images


def test_a_saved_folder_loads_and_draws_the_same(pipeline: EmuPipeline, checkpoint: Path) -> None:
    again = EmuPipeline.load(checkpoint)
    assert np.array_equal(_draw(pipeline, PROMPTS, [1, 2, 3]), _draw(again, PROMPTS, [1, 2, 3]))


def test_diffusers_own_loader_gives_the_same_images(pipeline: EmuPipeline, checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, as a stranger would: only emu_ray installed, its package never imported by hand."""
    script = f"""
import numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
noise = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
np.save({str(tmp_path / "images.npy")!r}, pipe({PROMPTS!r}, generator=noise, num_inference_steps=3, output_type="np").images)
"""
    repository = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.allclose(np.load(tmp_path / "images.npy"), _draw(pipeline, PROMPTS, [1, 2, 3]), atol=1e-5)


def test_an_image_is_the_same_alone_and_in_company(pipeline: EmuPipeline) -> None:
    company = _draw(pipeline, PROMPTS, [1, 2, 3])
    alone = _draw(pipeline, PROMPTS[1:2], [2])
    assert np.abs(company[1] - alone[0]).max() < 1e-4
    assert np.abs(company[0] - company[1]).max() > 1e-3


def test_guidance_1_runs_no_unconditional_pass(pipeline: EmuPipeline) -> None:
    widths: list[int] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, inputs: widths.append(len(inputs[0])))
    try:
        plain = _draw(pipeline, PROMPTS, [1, 2, 3], guidance_scale=1.0)
        _draw(pipeline, PROMPTS, [1, 2, 3], guidance_scale=2.0)
    finally:
        handle.remove()
    assert widths == [3] * 3 + [6] * 3
    nearly = _draw(pipeline, PROMPTS, [1, 2, 3], guidance_scale=1.0 + 1e-6)
    assert np.allclose(plain, nearly, atol=1e-4)


def test_an_unconditional_prompt_is_not_changed_by_guidance(pipeline: EmuPipeline) -> None:
    weak, strong = (_draw(pipeline, [""], [4], guidance_scale=g) for g in (1.0, 8.0))
    assert np.allclose(weak, strong, atol=1e-4)


def test_a_negative_prompt_equal_to_the_prompt_cancels_guidance(pipeline: EmuPipeline) -> None:
    cancelled = _draw(pipeline, PROMPTS[:1], [4], guidance_scale=8.0, negative_prompt=PROMPTS[0])
    assert np.allclose(cancelled, _draw(pipeline, PROMPTS[:1], [4], guidance_scale=1.0), atol=1e-4)


def test_sides_that_the_autoencoder_does_not_divide_are_refused(pipeline: EmuPipeline) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        pipeline("a", height=18, width=16)
    with pytest.raises(ValueError, match="one generator"):
        pipeline(["a", "b"], generator=[torch.Generator()])


def test_the_generator_gives_pixels_of_the_models_or_the_asked_size(checkpoint: Path) -> None:
    generator = Generator(checkpoint)
    images = generator.generate(PROMPTS, [1, 2, 3], FAST)
    assert (images.dtype, images.shape) == (np.uint8, (3, 16, 16, 3))
    assert generator.size_px == 16
    wide = generator.generate(PROMPTS[:1], [1], SamplingSettings(steps=2, height_px=16, width_px=24))
    assert wide.shape == (1, 16, 24, 3)
    assert np.array_equal(generator.generate(PROMPTS, [1, 2, 3], FAST), images)
    assert not np.array_equal(generator.generate(PROMPTS, [4, 5, 6], FAST), images)


def test_a_folder_that_is_no_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_index.json"):
        Generator(tmp_path)
