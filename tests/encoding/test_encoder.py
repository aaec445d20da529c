"""Columns, shapes and geometry of encoded pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_ray.encoding.encoder import LatentEncoder, decode, fit
from emu_ray.errors import InputError
from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    recipe = AutoencoderRecipe(
        latent_channels=4, space_to_depth=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    FourierAutoencoder.build(recipe).save_pretrained(folder)
    return folder


def _png(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", **options)
    return out.getvalue()


def _batch(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = [_png(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)) for _ in range(count)]
    return {
        "key": np.arange(count) + 7,
        "image": np.array(images, object),
        "caption": np.array(["a ball"] * count, object),
    }


def test_the_latents_columns_come_out_in_their_types_and_sizes(autoencoder: Path) -> None:
    encoder = LatentEncoder(str(autoencoder), 16, threads=torch.get_num_threads())
    out = encoder(_batch(3))
    assert set(out) == {"key", "bucket", "latent_mean", "latent_std", "caption"}
    assert out["key"].tolist() == [7, 8, 9]
    assert out["caption"].tolist() == ["a ball"] * 3
    assert out["bucket"].tolist() == ["16x16"] * 3
    for name in ("latent_mean", "latent_std"):
        assert [(v.dtype, v.shape) for v in out[name]] == [(np.float16, (4 * 4 * 4,))] * 3
    assert all((v > 0).all() for v in out["latent_std"])


def test_the_flat_latent_is_channels_first_and_the_autoencoders_own(autoencoder: Path) -> None:
    encoder = LatentEncoder(str(autoencoder), 16, threads=torch.get_num_threads())
    batch = _batch(2)
    pixels = np.stack([fit(decode(b), 16) for b in batch["image"]])
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, _ = FourierAutoencoder.from_pretrained(autoencoder).eval().moments(images)
    stored = np.stack(encoder(batch)["latent_mean"]).reshape(2, 4, 4, 4)
    assert np.allclose(stored, mean.numpy(), atol=2e-3)


def test_a_wide_picture_is_cropped_in_its_middle() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert fit(Image.fromarray(wide), 8).min() == 255
    assert fit(Image.fromarray(wide.transpose(1, 0, 2)), 8).min() == 255


def test_a_small_picture_is_scaled_up_to_cover_the_bucket() -> None:
    assert fit(Image.new("RGB", (5, 9), (10, 200, 30)), 16).shape == (16, 16, 3)


def test_a_turned_or_grey_picture_comes_upright_and_in_rgb() -> None:
    turned = np.zeros((4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    assert decode(_png(turned, exif=exif)).size == (4, 8)
    assert decode(_png(np.full((4, 4), 9, np.uint8))).getpixel((0, 0)) == (9, 9, 9)


def test_what_is_trained_on_is_what_was_scored() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 0] = 255  # red, and wholly transparent
    assert decode(_png(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_that_cannot_be_decoded_is_one_sentence() -> None:
    with pytest.raises(InputError, match="can't be decoded"):
        decode(_png(np.zeros((9, 9, 3), np.uint8))[:40])
