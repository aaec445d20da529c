"""What each family tells its U-Net is what diffusers' own pipelines tell theirs, and an image depends on its own prompt and seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl

from emu_ray.generation import Generator, SamplingSettings
from emu_ray.generation.base_folder import require_base
from emu_ray.generation.families import family_of
from emu_ray.models.denoiser import conditions, whole_picture_ids
from tests.generation.small_bases import BUILDERS, SIZE_PX, TOKENS, sdxl

PROMPTS = ["a photo of a red metal ball in a meadow", "two cubes!", "", "word " * 200]
FAST = SamplingSettings(steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def _plain(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_stable_diffusion_reads_the_layer_that_its_clip_ends_with(bases: dict[str, Path], name: str) -> None:
    family = require_base(str(bases[name])).family
    features = family.features(family.load(bases[name]), PROMPTS)
    plain = _plain(bases[name])
    assert isinstance(plain, StableDiffusionPipeline)
    theirs, empty = plain.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    assert torch.equal(features.tokens_BTD, theirs)
    assert features.pooled_BD is None
    by_hand = plain.tokenizer(PROMPTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    assert torch.allclose(features.tokens_BTD, plain.text_encoder(by_hand.input_ids).last_hidden_state, atol=1e-6)
    assert torch.allclose(family.unconditional(family.load(bases[name])).tokens_BTD[0], empty[0], atol=1e-6)


@torch.no_grad()
def test_sdxl_reads_the_last_layer_but_one_of_both_encoders_and_pools_by_the_second(bases: dict[str, Path]) -> None:
    family = require_base(str(bases["sdxl"])).family
    features = family.features(family.load(bases["sdxl"]), PROMPTS)
    plain = _plain(bases["sdxl"])
    assert isinstance(plain, StableDiffusionXLPipeline)
    theirs, _, pooled, _ = plain.encode_prompt(PROMPTS)
    assert torch.equal(features.tokens_BTD, theirs)
    assert torch.equal(features.pooled_BD, pooled)
    by_hand = []
    for tokenizer, encoder in ((plain.tokenizer, plain.text_encoder), (plain.tokenizer_2, plain.text_encoder_2)):
        ids = tokenizer(
            PROMPTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        by_hand.append(encoder(ids, output_hidden_states=True))
    joined = torch.cat([out.hidden_states[-2] for out in by_hand], dim=-1)
    assert torch.allclose(features.tokens_BTD, joined, atol=1e-6)
    assert torch.allclose(features.pooled_BD, by_hand[1].text_embeds, atol=1e-6)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_without_a_caption_is_what_its_pipeline_guides_away_from(zeros: bool, tmp_path: Path) -> None:
    folder = sdxl(tmp_path / "sdxl", force_zeros_for_empty_prompt=zeros)
    family = require_base(str(folder)).family
    found = family.unconditional(family.load(folder))
    _, tokens, _, pooled = _plain(folder).encode_prompt(["a ball"])
    assert torch.allclose(found.tokens_BTD, tokens, atol=1e-6)
    assert torch.allclose(found.pooled_BD, pooled, atol=1e-6)
    assert bool(found.tokens_BTD.any()) is not zeros


def test_what_the_u_net_is_told_beside_text_is_what_diffusers_tells_it(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, told = _plain(bases["sdxl"]), []
    monkeypatch.setattr(plain.unet, "forward", lambda *a, **k: told.append(k) or (torch.zeros_like(a[0]),))
    plain(
        ["a ball"], height=SIZE_PX, width=2 * SIZE_PX, num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    )
    family = family_of(plain)
    ours = conditions(family.features(plain, ["a ball"]), whole_picture_ids(SIZE_PX, 2 * SIZE_PX, 1))
    assert torch.equal(ours["encoder_hidden_states"], told[0]["encoder_hidden_states"])
    for name in ("text_embeds", "time_ids"):
        assert torch.equal(ours["added_cond_kwargs"][name].float(), told[0]["added_cond_kwargs"][name].float()), name
    assert pipeline_stable_diffusion_xl  # the module whose order of the six ids this is


@pytest.mark.parametrize("name", BUILDERS)
def test_an_image_is_the_plain_pipelines_and_the_same_alone_and_in_company(bases: dict[str, Path], name: str) -> None:
    generator = Generator(bases[name])
    company = generator.generate(PROMPTS[:3], [1, 2, 3], FAST)
    assert (company.dtype, company.shape, generator.size_px) == (np.uint8, (3, SIZE_PX, SIZE_PX, 3), SIZE_PX)
    alone = generator.generate(PROMPTS[1:2], [2], FAST)
    assert np.abs(company[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(company[1].astype(int) - company[0]).max() > 1
    theirs = _plain(bases[name])(
        PROMPTS[1],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(2),
        output_type="np",
    ).images
    assert np.abs(np.round(theirs[0] * 255) - alone[0]).max() <= 1
    wide = generator.generate(PROMPTS[:1], [1], SamplingSettings(steps=2, height_px=SIZE_PX, width_px=2 * SIZE_PX))
    assert wide.shape == (1, SIZE_PX, 2 * SIZE_PX, 3)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_negative_prompt_equal_to_the_prompt_cancels_guidance(bases: dict[str, Path], name: str) -> None:
    generator = Generator(bases[name])
    cancelled = generator.generate(PROMPTS[:1], [4], SamplingSettings(steps=2, guidance=8.0), PROMPTS[:1])
    plain = generator.generate(PROMPTS[:1], [4], SamplingSettings(steps=2, guidance=1.0))
    assert np.abs(cancelled.astype(int) - plain).max() <= 1
