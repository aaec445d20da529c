"""The presets: what they count, and that the small one answers."""

from __future__ import annotations

import torch

from emu_ray.models.denoiser import build, demo, emu


def test_the_emu_preset_has_the_papers_2_8_billion_parameters() -> None:
    with torch.device("meta"):
        network = build(emu(), latent_channels=16, latent_side=128, text_width=768 + 4096)
    count = sum(p.numel() for p in network.parameters())
    assert 0.98 * 2.8e9 <= count <= 1.02 * 2.8e9


@torch.no_grad()
def test_the_demo_preset_answers_in_the_shape_of_its_latents() -> None:
    network = build(demo(), latent_channels=16, latent_side=8, text_width=160)
    out = network(
        torch.randn(2, 16, 8, 8), torch.tensor([3, 999]), encoder_hidden_states=torch.randn(2, 48, 160)
    ).sample
    assert out.shape == (2, 16, 8, 8)
    assert sum(p.numel() for p in network.parameters()) < 6e6
