"""Shapes, the Fourier transform and the normalisation of the autoencoder."""

from __future__ import annotations

from math import pi
from pathlib import Path

import pytest
import torch

from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder, fourier_features

TINY = AutoencoderRecipe(
    latent_channels=4,
    space_to_depth=2,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_attention=False,
)


@pytest.fixture
def network() -> FourierAutoencoder:
    torch.manual_seed(0)
    return FourierAutoencoder.build(TINY).eval()


def test_fourier_features_have_their_closed_form() -> None:
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    features = fourier_features(images, 2)
    parts = [images, *(f(k * pi * images) for k in (1, 2) for f in (torch.sin, torch.cos))]
    assert torch.allclose(features, torch.cat(parts, dim=1), atol=1e-5)
    assert torch.equal(fourier_features(images, 0), images)


def test_the_transform_has_no_parameters_and_both_versions_the_same_decoder() -> None:
    plain = FourierAutoencoder.build(AutoencoderRecipe(**{**vars(TINY), "fourier_frequencies": 0}))
    fourier = FourierAutoencoder.build(TINY)
    first = {k for k, v in fourier.state_dict().items() if v.shape != plain.state_dict()[k].shape}
    assert first == {"vae.encoder.conv_in.weight"}


@torch.no_grad()
def test_latents_are_f_times_smaller_and_images_come_back_in_their_size_and_range(network: FourierAutoencoder) -> None:
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = network.moments(images)
    assert mean.shape == std.shape == (2, 4, 4, 6)
    assert (std > 0).all()
    assert network.downsampling == TINY.downsampling == 4
    out = network.decode(network.normalize(mean) * 50)
    assert out.shape == images.shape
    assert out.abs().max() <= 1


@torch.no_grad()
def test_decode_undoes_normalize(network: FourierAutoencoder) -> None:
    network.latent_mean.copy_(torch.arange(4.0))
    network.latent_std.copy_(torch.arange(1.0, 5.0))
    raw = torch.randn(1, 4, 4, 4)
    assert torch.allclose(network.decode(network.normalize(raw)), network.decode_raw(raw).clamp(-1, 1), atol=1e-5)


@torch.no_grad()
def test_a_saved_autoencoder_loads_with_its_normalisation(network: FourierAutoencoder, tmp_path: Path) -> None:
    network.latent_std.fill_(3.0)
    network.save_pretrained(tmp_path)
    again = FourierAutoencoder.from_pretrained(tmp_path).eval()
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.latent_std, network.latent_std)
    assert torch.equal(again.moments(images)[0], network.moments(images)[0])


def test_the_default_is_the_papers_f8_with_16_channels() -> None:
    assert AutoencoderRecipe().downsampling == 8
    assert AutoencoderRecipe().latent_channels == 16
