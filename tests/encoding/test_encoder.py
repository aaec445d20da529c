"""Columns, shapes and geometry of encoded pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_ray.encoding.buckets import bucket_sizes, nearest
from emu_ray.encoding.encoder import LatentEncoder, decode, fit
from emu_ray.errors import InputError, RecipeError
from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder
from emu_ray.records import ORIGIN


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
    encoder = LatentEncoder(str(autoencoder), [(16, 16)], threads=torch.get_num_threads())
    out = encoder(_batch(3))
    assert set(out) == {"key", "bucket", "latent_mean", "latent_std", "caption", *ORIGIN}
    assert [[int(v) for v in out[name]] for name in ORIGIN] == [[20] * 3, [16] * 3, [2] * 3, [0] * 3]
    assert out["key"].tolist() == [7, 8, 9]
    assert out["caption"].tolist() == ["a ball"] * 3
    assert out["bucket"].tolist() == ["16x16"] * 3
    for name in ("latent_mean", "latent_std"):
        assert [(v.dtype, v.shape) for v in out[name]] == [(np.float16, (4 * 4 * 4,))] * 3
    assert all((v > 0).all() for v in out["latent_std"])


def test_the_flat_latent_is_channels_first_and_the_autoencoders_own(autoencoder: Path) -> None:
    encoder = LatentEncoder(str(autoencoder), [(16, 16)], threads=torch.get_num_threads())
    batch = _batch(2)
    pixels = np.stack([fit(decode(b, 1), (16, 16)).pixels for b in batch["image"]])
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, _ = FourierAutoencoder.from_pretrained(autoencoder).eval().moments(images)
    stored = np.stack(encoder(batch)["latent_mean"]).reshape(2, 4, 4, 4)
    assert np.allclose(stored, mean.numpy(), atol=2e-3)


def test_a_wide_picture_is_cropped_in_its_middle() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert fit(Image.fromarray(wide), (8, 8)).pixels.min() == 255
    assert fit(Image.fromarray(wide.transpose(1, 0, 2)), (8, 8)).pixels.min() == 255


def test_a_small_picture_is_scaled_up_to_cover_the_bucket() -> None:
    assert fit(Image.new("RGB", (5, 9), (10, 200, 30)), (16, 16)).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("width_px", "height_px", "left_px", "top_px"), [(16, 16, 0, 0), (100, 50, 8, 0), (50, 100, 0, 8), (8, 4, 8, 0), (33, 16, 8, 0)]
)  # fmt: skip
def test_a_picture_keeps_its_size_and_where_it_was_cropped_when_it_covers_the_bucket(
    width_px: int, height_px: int, left_px: int, top_px: int
) -> None:
    assert fit(Image.new("RGB", (width_px, height_px)), (16, 16)).origin == (width_px, height_px, left_px, top_px)


def test_a_turned_or_grey_picture_comes_upright_and_in_rgb() -> None:
    turned = np.zeros((4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    assert decode(_png(turned, exif=exif), 1).size == (4, 8)
    assert decode(_png(np.full((4, 4), 9, np.uint8)), 1).getpixel((0, 0)) == (9, 9, 9)


def test_what_is_trained_on_is_what_was_scored() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 0] = 255  # red, and wholly transparent
    assert decode(_png(clear), 1).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_that_cannot_be_decoded_is_one_sentence() -> None:
    with pytest.raises(InputError, match="the picture of key 77, 40 bytes, can't be decoded"):
        decode(_png(np.zeros((9, 9, 3), np.uint8))[:40], 77)


def test_pictures_of_several_shapes_get_the_bucket_that_crops_least_and_keep_their_order(autoencoder: Path) -> None:
    sizes = bucket_sizes(16, 4.0, 4)
    shapes = [(16, 20), (40, 12), (12, 40), (16, 16)]  # height, width
    batch = _batch(4)
    rng = np.random.default_rng(1)
    batch["image"] = np.array([_png(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in shapes], object)
    out = LatentEncoder(str(autoencoder), sizes, threads=torch.get_num_threads())(batch)
    assert out["bucket"].tolist() == ["16x16", "8x32", "32x8", "16x16"]
    for row, (bucket, mean) in enumerate(zip(out["bucket"], out["latent_mean"], strict=True)):
        width, height = (int(side) for side in bucket.split("x"))
        assert len(mean) == 4 * (width // 4) * (height // 4)
        alone = LatentEncoder(str(autoencoder), sizes, threads=torch.get_num_threads())(
            {k: v[row : row + 1] for k, v in batch.items()}
        )
        assert np.allclose(alone["latent_mean"][0], mean, atol=1e-2)


def test_without_deviations_the_column_is_empty(autoencoder: Path) -> None:
    out = LatentEncoder(str(autoencoder), [(16, 16)], keeps_std=False, threads=torch.get_num_threads())(_batch(2))
    assert out["latent_std"] == [None, None]


def test_buckets_have_one_area_and_the_square_is_first() -> None:
    sizes = bucket_sizes(1024, 2.0, 64)
    assert sizes[0] == (1024, 1024)
    assert (1152, 896) in sizes
    assert all(side % 64 == 0 for size in sizes for side in size)
    assert all(abs(w * h / 1024**2 - 1) < 0.05 and max(w, h) / min(w, h) <= 2 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert bucket_sizes(100, 1.0, 64) == [(100, 100)]
    assert nearest(3000, 2000, sizes) == (1280, 832)


@pytest.mark.parametrize(("size_px", "max_aspect"), [(100, 2.0), (128, 0.5)])
def test_buckets_that_can_not_be_are_refused(size_px: int, max_aspect: float) -> None:
    with pytest.raises(RecipeError):
        bucket_sizes(size_px, max_aspect, 64)
