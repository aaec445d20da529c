"""Autoencoders behind one interface: Emu's own (arXiv 2309.15807, section 3.1 and Table 1) and published ones of diffusers' AutoencoderKL.

Emu's has up to 16 latent channels behind a fixed Fourier feature transform. The paper names the transform but gives neither formula nor
frequencies; ours is the usual one of positional encodings, x -> (x, sin(2^k pi x), cos(2^k pi x)) for k = 0 .. K-1. The inner network is
AutoencoderKL, unchanged. A published one keeps the normalisation that its config.json states, since U-Nets were trained on it.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import pi
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor, nn
from torch.nn import functional as F

from emu_ray.errors import InputError, first_line
from emu_ray.models.hub import is_hub_name, read_json


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in -1..1 to latents (B, C, H/f, W/f) and back; normalized latents are (raw - latent_mean) / latent_std per channel."""

    vae: AutoencoderKL
    downsampling: int  # f, image pixels per latent pixel along one side
    latent_mean: Tensor  # (C,)
    latent_std: Tensor  # (C,)
    config: Any  # as diffusers wrote it
    device: torch.device
    dtype: torch.dtype
    save_pretrained: Callable[..., None]  # writes the folder that `load_autoencoder` reads

    @property
    def latent_channels(self) -> int:
        """C."""
        return len(self.latent_mean)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that makes pixels of the decoder's last features."""
        return self.vae.decoder.conv_out.weight  # type: ignore[no-any-return]

    @abstractmethod
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw posterior mean and standard deviation, each (B, C, H/f, W/f): what the `latents` station stores."""

    @abstractmethod
    def decode_raw(self, raw: Tensor) -> Tensor:
        """Images in about -1..1 (not clipped) from raw latents."""

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents to what the denoiser sees."""
        return (raw - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in -1..1 from normalized latents."""
        raw = latents * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)
        return self.decode_raw(raw).clamp(-1, 1)


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


class FourierAutoencoder(Autoencoder, ModelMixin, ConfigMixin):
    """Emu's own; its normalized latents have mean 0 and deviation 1 per channel, as measured after training."""

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

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Images in about -1..1 (not clipped) from raw latents."""
        return F.pixel_shuffle(self.vae.decode(raw).sample, self.config["space_to_depth"])


def fourier_features(images: Tensor, frequencies: int) -> Tensor:
    """(B, 3, H, W) in -1..1 to (B, 3 (1 + 2K), H, W): the images, then sine and cosine at 2^k pi for k = 0 .. K-1."""
    if frequencies == 0:
        return images
    waves = [trig(2**k * pi * images) for k in range(frequencies) for trig in (torch.sin, torch.cos)]
    return torch.cat([images, *waves], dim=1)


class PublishedAutoencoder(Autoencoder):
    """A published AutoencoderKL, such as that of Stable Diffusion, SDXL, SD3 or FLUX; `vae` is the diffusers model itself.

    Normalized latents are (raw - shift_factor) * scaling_factor, or, where the config has `latents_mean` and `latents_std`,
    (raw - latents_mean) / latents_std * scaling_factor, as in diffusers' own pipelines.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config
        self.downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
        mean, std = _published_normalisation(vae.config)
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_std", std, persistent=False)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw posterior mean and standard deviation, each (B, C, H/f, W/f)."""
        self._upcast()
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Images in about -1..1 (not clipped) from raw latents."""
        self._upcast()
        return self.vae.decode(raw.to(self.vae.dtype)).sample  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of its weights."""
        return self.vae.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its weights lie."""
        return self.vae.device  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        """Writes the folder that AutoencoderKL.from_pretrained and `load_autoencoder` read."""
        self.vae.save_pretrained(folder)

    def _upcast(self) -> None:
        """SDXL's activations leave the range of float16 (`force_upcast` of its config): its weights go back to float32."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The autoencoder of a local folder or of a hub's name, in float32 and eval mode, whichever class its config.json names.

    A pipeline's folder is taken for the `vae` in it. InputError for anything else: missing, half-written, another class, weights that are
    corrupt or don't fit the config. An s3:// folder is fetched before, by `stations.folders.local_folder`.
    """
    config, subfolder = _config(folder)
    where = f"{folder}/{subfolder}" if subfolder else str(folder)
    name = config.get("_class_name")
    if name not in ("FourierAutoencoder", "AutoencoderKL"):
        raise InputError(
            f"{where}/config.json: expected the class FourierAutoencoder or AutoencoderKL, found {name!r}: "
            "give the folder of an autoencoder, or of a pipeline with one in `vae`"
        )
    cls = FourierAutoencoder if name == "FourierAutoencoder" else AutoencoderKL
    options: dict[str, Any] = {"torch_dtype": torch.float32, "output_loading_info": True}
    if subfolder:
        options["subfolder"] = subfolder
    if _only_half_precision(Path(where)):
        options["variant"] = "fp16"
    try:
        found, info = cls.from_pretrained(str(folder), **options)
    except Exception as error:  # diffusers, safetensors, torch and the hub each raise their own
        raise InputError(
            f"can't load the autoencoder of {where}: {first_line(error)[:300]}; fetch or write it anew"
        ) from error
    if left := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise InputError(
            f"{where}: its weights don't fit its config.json: {len(info['missing_keys'])} are missing, {len(info['unexpected_keys'])} unknown "
            f"(e.g. {sorted(left)[0]}); fetch or write it anew"
        )
    return (PublishedAutoencoder(found) if name == "AutoencoderKL" else found).eval()  # type: ignore[no-any-return]


def identity_of(folder: str | Path) -> str:
    """16 hex digits that tell an autoencoder by its weights as float16, however its folder was written: what latents are stamped with."""
    found = hashlib.sha256()
    for name, value in sorted(load_autoencoder(folder).state_dict().items()):
        found.update(name.encode())
        found.update(value.half().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _config(folder: str | Path) -> tuple[dict[str, Any], str]:
    """The config.json of an autoencoder and the subfolder in which it lies, "" or "vae"."""
    local = Path(folder)
    if local.is_dir():
        for subfolder in ("", "vae"):
            file = local / subfolder / "config.json"
            if file.is_file():
                return read_json(file), subfolder
        raise InputError(
            f"{folder}: expected the config.json of an autoencoder there or in `vae`, found none: "
            "the folder is half-written or another; fetch or write it anew"
        )
    if not is_hub_name(str(folder)):
        raise InputError(
            f"{folder}: expected the folder of an autoencoder, found none: run the job that writes it, or give another path"
        )
    for subfolder in ("", "vae"):
        try:
            return read_json(Path(hf_hub_download(str(folder), "config.json", subfolder=subfolder or None))), subfolder
        except RemoteEntryNotFoundError as error:  # the name is a pipeline's, or another model's
            missing: Exception = error
        except (OSError, ValueError) as error:  # no such name, no network, no permission
            missing = error
            break
    raise InputError(
        f"{folder} is neither a folder here nor an autoencoder that the hub gives ({first_line(missing)[:200]}): give another path"
    ) from missing


def _only_half_precision(folder: Path) -> bool:
    """Whether a local folder holds nothing but the `fp16` variant of the weights."""
    return bool(list(folder.glob("*.fp16.*"))) and not list(folder.glob("diffusion_pytorch_model.[sb]*"))


def _published_normalisation(config: Any) -> tuple[Tensor, Tensor]:
    """(C,) mean and deviation that make (raw - mean) / std what the published U-Nets were trained on."""
    channels, scaling, means, stds = (
        config.latent_channels,
        config.scaling_factor,
        config.latents_mean,
        config.latents_std,
    )
    if (means is None) != (stds is None):
        raise InputError("an AutoencoderKL's config.json must have both of latents_mean and latents_std, or neither")
    mean = torch.tensor(means) if means else torch.full((channels,), float(config.shift_factor or 0))
    std = (torch.tensor(stds) if stds else torch.ones(channels)) / (scaling or math.nan)
    if mean.shape != (channels,) or std.shape != (channels,) or not bool(mean.isfinite().all() and (std > 0).all()):
        raise InputError(
            f"an AutoencoderKL's config.json must give {channels} channels a finite mean and a deviation above 0, found "
            f"scaling_factor {scaling}, shift_factor {config.shift_factor}, latents_mean {means}, latents_std {stds}"
        )
    return mean.float(), std.float()
