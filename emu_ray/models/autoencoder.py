"""Emu's autoencoder: 16 latent channels behind a fixed Fourier feature transform (arXiv 2309.15807, section 3.1 and Table 1).

The paper names the transform but gives neither formula nor frequencies; ours is the usual one of positional encodings,
x -> (x, sin(2^k pi x), cos(2^k pi x)) for k = 0 .. K-1. The inner network is diffusers' AutoencoderKL, unchanged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import pi

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Sizes of the autoencoder. Down-sampling is space_to_depth x 2 ** (len(block_out_channels) - 1)."""

    latent_channels: int = 16
    fourier_frequencies: int = 2  # K; 0 turns the transform off
    space_to_depth: int = 1  # a fixed rearrangement in front, which makes full-resolution layers unnecessary
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_attention: bool = True

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side."""
        return self.space_to_depth * 2 ** (len(self.block_out_channels) - 1)


class FourierAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) in -1..1 to latents (B, C, H/f, W/f) and back; latents leave with mean 0 and deviation 1 per channel."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        fourier_frequencies: int = 2,
        space_to_depth: int = 1,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_attention: bool = True,
    ) -> None:
        super().__init__()
        levels, patch = len(block_out_channels), space_to_depth**2
        self.vae = AutoencoderKL(
            in_channels=3 * (1 + 2 * fourier_frequencies) * patch,
            out_channels=3 * patch,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_attention,
        )
        self.downsampling = space_to_depth * 2 ** (levels - 1)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @classmethod
    def build(cls, recipe: AutoencoderRecipe) -> FourierAutoencoder:
        """A fresh autoencoder of the recipe's sizes."""
        return cls(**asdict(recipe))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw posterior mean and standard deviation, each (B, C, H/f, W/f): what the `latents` station stores."""
        features = fourier_features(images, self.config["fourier_frequencies"])
        patches = F.pixel_unshuffle(features, self.config["space_to_depth"])
        posterior = self.vae.encode(patches.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents to mean 0, deviation 1 per channel: what the denoiser sees."""
        return (raw - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Images in about -1..1 (not clipped) from raw latents."""
        return F.pixel_shuffle(self.vae.decode(raw).sample, self.config["space_to_depth"])

    def decode(self, latents: Tensor) -> Tensor:
        """Images in -1..1 from normalized latents."""
        raw = latents * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)
        return self.decode_raw(raw).clamp(-1, 1)


def fourier_features(images: Tensor, frequencies: int) -> Tensor:
    """(B, 3, H, W) in -1..1 to (B, 3 (1 + 2K), H, W): the images, then sine and cosine at 2^k pi for k = 0 .. K-1."""
    if frequencies == 0:
        return images
    waves = [trig(2**k * pi * images) for k in range(frequencies) for trig in (torch.sin, torch.cos)]
    return torch.cat([images, *waves], dim=1)
