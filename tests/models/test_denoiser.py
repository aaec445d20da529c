"""The presets: what they count, and that the small one answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emu_ray.models.denoiser import build, conditions, demo, emu, is_micro_conditioned, whole_picture_ids
from emu_ray.models.text import TextFeatures

EMU_PARAMETERS, EMU_PARAMETERS_MICRO = 2_790_219_408, 2_796_120_720


@pytest.mark.parametrize(("micro_conditioning", "count"), [(False, EMU_PARAMETERS), (True, EMU_PARAMETERS_MICRO)])
def test_the_emu_preset_has_the_papers_2_8_billion_parameters_within_2_percent(
    micro_conditioning: bool, count: int
) -> None:
    recipe = replace(emu(), micro_conditioning=micro_conditioning)
    with torch.device("meta"):
        network = build(recipe, latent_channels=16, latent_side=128, text_width=768 + 4096, pooled_width=768)
    found = sum(p.numel() for p in network.parameters())
    assert abs(found / 2.8e9 - 1) <= 0.02
    assert found == count
    assert is_micro_conditioned(network) is micro_conditioning


@torch.no_grad()
def test_sizes_and_crops_change_the_answer_of_a_u_net_that_is_told_them() -> None:
    recipe = replace(demo(), micro_conditioning=True)
    network = build(recipe, latent_channels=4, latent_side=8, text_width=10, pooled_width=6).eval()
    text = TextFeatures(torch.randn(1, 3, 10), torch.randn(1, 6))
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    small, large = (whole_picture_ids(side, side, 1) for side in (64, 512))
    cropped = small + torch.tensor([[0, 0, 9, 0, 0, 0]])
    answers = [network(noisy, t, **conditions(text, ids)).sample for ids in (small, large, cropped, small)]
    assert torch.equal(answers[0], answers[3])
    assert not torch.allclose(answers[0], answers[1], atol=1e-4)
    assert not torch.allclose(answers[0], answers[2], atol=1e-5)
    assert whole_picture_ids(48, 64, 2).tolist() == [[48, 64, 0, 0, 48, 64]] * 2


@torch.no_grad()
def test_the_demo_preset_answers_in_the_shape_of_its_latents() -> None:
    network = build(demo(), latent_channels=16, latent_side=8, text_width=160)
    out = network(
        torch.randn(2, 16, 8, 8), torch.tensor([3, 999]), encoder_hidden_states=torch.randn(2, 48, 160)
    ).sample
    assert out.shape == (2, 16, 8, 8)
    assert sum(p.numel() for p in network.parameters()) < 6e6
