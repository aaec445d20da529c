"""Autoencoders of other people behind our interface: every published layout, and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from emu_ray.errors import InputError
from emu_ray.models import autoencoder as module
from emu_ray.models.autoencoder import (
    AutoencoderRecipe,
    FourierAutoencoder,
    PublishedAutoencoder,
    load_autoencoder,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
# the fields in which the published config.json differ: runwayml/stable-diffusion-v1-5, stabilityai/sdxl-vae,
# playgroundai/playground-v2.5, stabilityai/stable-diffusion-3-medium and black-forest-labs/FLUX.1-dev
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd15": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True, "latents_mean": None, "latents_std": None},
    "playground": {
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    },
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
}  # fmt: skip


def _vae(**fields: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **fields,
    ).eval()


def _saved(folder: Path, layout: str) -> AutoencoderKL:
    """The layout's checkpoint; the config.json holds what the published one holds and no more."""
    vae = _vae(**LAYOUTS[layout])
    vae.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    optional = ("shift_factor", "latents_mean", "latents_std", "force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")  # fmt: skip
    kept = {k: v for k, v in written.items() if k in LAYOUTS[layout] or k not in optional}
    (folder / "config.json").write_text(json.dumps(kept))
    return vae


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_published_autoencoder_gives_the_latents_that_its_u_nets_know(layout: str, tmp_path: Path) -> None:
    vae, fields = _saved(tmp_path, layout), LAYOUTS[layout]
    found = load_autoencoder(tmp_path)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    raw, std = found.moments(images)
    posterior = vae.encode(images).latent_dist
    assert torch.equal(raw, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert (found.downsampling, found.latent_channels) == (2, fields["latent_channels"])
    if means := fields.get("latents_mean"):
        mean, deviation = (torch.tensor(v).view(-1, 1, 1) for v in (means, fields["latents_std"]))
        expected = (raw - mean) / deviation * fields["scaling_factor"]
    else:
        expected = (raw - fields.get("shift_factor", 0)) * fields["scaling_factor"]
    assert torch.allclose(found.normalize(raw), expected, atol=1e-5)
    assert torch.allclose(found.decode(found.normalize(raw)), vae.decode(raw).sample.clamp(-1, 1), atol=1e-5)


@torch.no_grad()
def test_stable_diffusions_old_names_of_attention_are_read(tmp_path: Path) -> None:
    vae = _saved(tmp_path, "sd15")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(tmp_path / WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = value
    assert any(".query." in name for name in state)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(load_autoencoder(tmp_path).moments(images)[0], vae.encode(images).latent_dist.mean)


@torch.no_grad()
def test_sdxl_in_half_precision_goes_back_to_float32(tmp_path: Path) -> None:
    _saved(tmp_path, "sdxl")
    found = load_autoencoder(tmp_path)
    expected = found.moments(torch.ones(1, 3, 8, 8))[0]
    half = load_autoencoder(tmp_path).to(torch.float16)
    raw = half.moments(torch.ones(1, 3, 8, 8, dtype=torch.float16))[0]
    assert raw.dtype == half.dtype == torch.float32
    assert torch.allclose(raw, expected, atol=1e-2)
    other = PublishedAutoencoder(_vae(force_upcast=False)).to(torch.bfloat16)
    assert other.decode_raw(torch.ones(1, 4, 4, 4)).dtype == torch.bfloat16


def test_our_own_loads_in_float32_and_out_of_a_pipelines_folder(tmp_path: Path) -> None:
    sizes = AutoencoderRecipe(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    ours = FourierAutoencoder.build(sizes)
    ours.half().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    found = load_autoencoder(tmp_path)
    assert isinstance(found, FourierAutoencoder)
    assert not found.training
    assert (found.dtype, found.latent_channels, found.downsampling) == (torch.float32, 4, 2)
    assert torch.equal(found.last_layer, ours.last_layer.float())


def test_a_folder_of_the_half_precision_variant_alone_is_read(tmp_path: Path) -> None:
    _vae(latent_channels=4).half().save_pretrained(tmp_path, variant="fp16")
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert load_autoencoder(tmp_path).dtype == torch.float32


def test_a_trained_published_one_is_written_in_its_own_layout(tmp_path: Path) -> None:
    _saved(tmp_path / "first", "sd3")
    load_autoencoder(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = AutoencoderKL.from_pretrained(tmp_path / "second")
    assert again.config.shift_factor == LAYOUTS["sd3"]["shift_factor"]


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _without(folder: Path, prefix: str) -> None:
    state = {k: v for k, v in load_file(folder / WEIGHTS).items() if not k.startswith(prefix)}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _configure(folder: Path, **fields: Any) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **fields}))


BROKEN = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "can't load the autoencoder"),
    "cut weights": (_cut, "can't load the autoencoder"),
    "half of the weights": (lambda f: _without(f, "decoder."), "don't fit its config.json: .* are missing"),
    "other sizes": (lambda f: _configure(f, block_out_channels=[8, 16]), "can't load|don't fit"),
    "no config": (lambda f: (f / "config.json").unlink(), "found none: the folder is half-written"),
    "a cut config": (lambda f: (f / "config.json").write_text('{"_class_name": '), "expected JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "another class": (lambda f: _configure(f, _class_name="AutoencoderTiny"), "found 'AutoencoderTiny'"),
    "a mean without a deviation": (lambda f: _configure(f, latents_mean=[0.0] * 4), "both of latents_mean"),
    "no scaling": (lambda f: _configure(f, scaling_factor=0), "finite mean and a deviation above 0"),
    "too few means": (lambda f: _configure(f, latents_mean=[0.0], latents_std=[1.0]), "must give 4 channels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_autoencoder_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    _saved(tmp_path, "sd15")
    spoil, said = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(InputError, match=said):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("address", ["no/such/folder", "nowhere", "./one/two", "/one"])
def test_a_place_where_nothing_lies_is_refused_without_asking_the_hub(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hf_hub_download", None)
    with pytest.raises(InputError, match="expected the folder of an autoencoder, found none"):
        load_autoencoder(address)


def test_a_hubs_name_without_a_network_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(module, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match="neither a folder here nor an autoencoder that the hub gives .no network"):
        load_autoencoder("someone/vae")
