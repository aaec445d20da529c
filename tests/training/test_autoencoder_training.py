"""Training an autoencoder: which pictures it sees, what it starts from, and that a discriminator's game goes on after a stop."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from emu_ray.errors import EmuRayError, InputError, RecipeError
from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder, PublishedAutoencoder, load_autoencoder
from emu_ray.models.discriminator import DiscriminatorRecipe
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station
from emu_ray.training import autoencoder_run
from emu_ray.training.autoencoder import AutoencoderTraining, train_autoencoder
from emu_ray.training.autoencoder_run import AutoencoderRun, load_pictures, run_autoencoder
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.reconstruction import AdversarialRecipe
from jobs.train_autoencoder import RECIPES
from tests.training.processes import together, worker_of_group

# torch's own, when a checkpoint is written without other workers
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
SIZES = AutoencoderRecipe(
    latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
)
ADVERSARY = AdversarialRecipe(start_step=1, discriminator=DiscriminatorRecipe(width=8, halvings=2, norm_num_groups=4))


def _training(**changes: Any) -> AutoencoderTraining:
    loop = LoopRecipe(steps=4, batch_size=4, warmup_steps=0, learning_rate=1e-3, checkpoint_every_steps=2)
    return replace(AutoencoderTraining(size_px=16, network=SIZES, adversarial=ADVERSARY, loop=loop), **changes)


def _images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def _weights(training: AutoencoderTraining, folder: Path | None = None) -> dict[str, Tensor]:
    network, progress = train_autoencoder(training, _images(), LocalWorker(folder))
    assert progress.step == training.loop.steps
    return network.state_dict()


def test_a_game_that_was_stopped_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    training = _training()
    undisturbed = _weights(training)
    _weights(replace(training, loop=replace(training.loop, steps=2)), tmp_path)
    resumed = _weights(training, tmp_path)
    assert all(torch.allclose(undisturbed[name], value, atol=1e-6) for name, value in resumed.items())
    without = _weights(_training(adversarial=None))
    assert any(not torch.allclose(undisturbed[name], value, atol=1e-6) for name, value in without.items())


def _game(rank: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The whole game as one of the group's workers plays it."""
    loop = LoopRecipe(steps=6, batch_size=4, warmup_steps=0, learning_rate=1e-3, log_every_steps=1)
    training = _training(loop=loop)
    network, progress = train_autoencoder(training, _images(), worker_of_group() if rank >= 0 else LocalWorker())
    return dict(network.state_dict()), progress.history


@pytest.mark.slow
def test_two_workers_play_the_game_that_one_plays() -> None:
    alone, history = _game(-1)
    for weights, theirs in together(2, _game):
        for step, mine in zip(theirs, history, strict=True):
            assert step["adversarial_weight"] == pytest.approx(mine["adversarial_weight"], rel=1e-3)
        assert all(torch.allclose(alone[name], value, atol=1e-4) for name, value in weights.items())
    assert history[-1]["adversarial_weight"] > 0


def test_both_sides_of_the_game_are_logged() -> None:
    network, progress = train_autoencoder(_training(), _images(), LocalWorker())
    assert {"loss", "kl", "psnr", "adversarial", "adversarial_weight", "opponent_loss", "opponent_real"} <= set(
        progress.history[-1]
    )
    latents = network.normalize(network.moments(torch.rand(4, 3, 16, 16))[0])
    assert latents.shape == (4, 4, 8, 8)


def test_a_published_autoencoder_is_trained_on_and_keeps_its_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.25
    ).save_pretrained(tmp_path / "start")
    network, _ = train_autoencoder(_training(start=str(tmp_path / "start")), _images(), LocalWorker())
    assert isinstance(network, PublishedAutoencoder)
    assert network.latent_mean.tolist() == [0.25] * 4
    assert network.latent_std.tolist() == [2.0] * 4
    network.save_pretrained(tmp_path / "end")
    first, second = (load_autoencoder(tmp_path / name).state_dict() for name in ("start", "end"))
    assert not torch.equal(first["vae.encoder.conv_in.weight"], second["vae.encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size_px": 15}, "multiple of the autoencoder's downsampling, found 15 px for 2"),
        ({"size_px": 10}, "discriminator needs pictures of at least 12 px, found size_px 10"),
        ({"kl_weight": -1.0}, "kl_weight .* at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_where_the_recipe_is_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        _training(**changes)


@pytest.mark.parametrize(
    ("name", "channels", "frequencies"), [("4", 4, 0), ("8", 8, 0), ("16", 16, 0), ("fourier16", 16, 2)]
)
@torch.no_grad()
def test_the_recipes_of_table_1_differ_in_channels_and_transform_alone(
    name: str, channels: int, frequencies: int
) -> None:
    recipe = RECIPES[f"table1-{name}"]
    network = FourierAutoencoder.build(recipe.training.network).eval()
    mean, _ = network.moments(torch.zeros(1, 3, 32, 32))
    assert mean.shape == (1, channels, 4, 4)
    assert network.decode(mean).shape == (1, 3, 32, 32)
    real = RECIPES["emu" if frequencies else f"emu-{name}"]
    for run, full in ((recipe, RECIPES["table1-fourier16"]), (real, RECIPES["emu"])):
        sizes = run.training.network
        assert (sizes.latent_channels, sizes.fourier_frequencies) == (channels, frequencies)
        alike = replace(sizes, latent_channels=16, fourier_frequencies=2)
        assert replace(run, name=full.name, training=replace(run.training, network=alike)) == full
    leg = RECIPES[f"table1-{name}-adversarial"]
    assert (leg.training.start, leg.name) == (f"ROOT/{recipe.name}", f"{recipe.name}-adversarial")
    assert leg.training.adversarial is not None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pool of 8 plain pictures, each of its key's shade of grey."""
    keys = range(8)
    images = []
    for key in keys:
        stream = io.BytesIO()
        Image.new("RGB", (20, 16), (10 * key,) * 3).save(stream, "PNG")
        images.append(stream.getvalue())
    rows = {
        "key": keys, "image": images, "caption": ["ball"] * 8, "width_px": [20] * 8, "height_px": [16] * 8,
        "likes": [None] * 8, "source": ["test"] * 8,
    }  # fmt: skip
    pool = Station(tmp_path / "pool")
    pool.begin("by hand", "{}", "pool", {})
    pool.write_table("part-0.parquet", pa.table({f.name: pa.array(rows[f.name], f.type) for f in SCHEMAS["pool"]}))
    pool.finish()
    return tmp_path


def test_held_out_keys_are_not_loaded(root: Path) -> None:
    images = load_pictures(str(root), 16, None, held_out_every=4)
    assert images.shape == (6, 16, 16, 3)
    assert images[:, 0, 0, 0].tolist() == [10, 20, 30, 50, 60, 70]
    assert len(load_pictures(str(root), 16, None)) == 8


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `run_autoencoder` would have trained."""
    jobs: list[Any] = []
    monkeypatch.setattr(autoencoder_run, "run_training", jobs.append)
    return jobs


def _trained(root: Path, held_out_every: int | None) -> str:
    """An autoencoder that the pool below the root made."""
    folder = root / "autoencoders" / "first"
    station = Station(folder)
    pool = Station(root / "pool").require().fingerprint
    station.begin("by hand", json.dumps({"held_out_every": held_out_every}), "checkpoint", {"pool": pool})
    FourierAutoencoder.build(SIZES).save_pretrained(folder)
    station.finish()
    return "ROOT/autoencoders/first"


@pytest.mark.parametrize(("before", "now"), [(4, 4), (None, None), (4, None)])
def test_a_second_leg_may_show_what_the_first_showed(
    before: int | None, now: int | None, root: Path, asked: list[Any]
) -> None:
    training = _training(start=_trained(root, before))
    run_autoencoder(
        AutoencoderRun(
            root=str(root), training=training, keep_reasons=None, held_out_every=now, name="autoencoders/two"
        )
    )
    assert asked[0].target == f"{root}/autoencoders/two"
    assert asked[0].recipe.training.start == f"{root}/autoencoders/first"
    assert asked[0].inputs["start"] == Station(root / "autoencoders" / "first").require().fingerprint


def _half_of_alexnet(root: Path) -> str:
    torch.save(torchvision.models.alexnet(weights=None).features.state_dict(), root / "backbone.pth")
    return f"{root}/backbone.pth"


REFUSED: dict[str, tuple[Callable[[Path], AutoencoderRun], type[EmuRayError], str]] = {
    "a leg that saw them": (
        lambda r: AutoencoderRun(root=str(r), training=_training(start=_trained(r, None)), keep_reasons=None, held_out_every=4),
        RecipeError,
        "with held_out_every None, found 4 now: pictures that it saw",
    ),
    "a missing backbone": (
        lambda r: AutoencoderRun(root=str(r), training=_training(perceptual="ROOT/none.pth"), keep_reasons=None),
        InputError,
        "none.pth: expected the file of a backbone's weights, found none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_trained_is_refused_on_the_driver(name: str, root: Path, asked: list[Any]) -> None:
    make, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        run_autoencoder(make(root))
    assert not asked


def test_a_backbone_counts_by_its_content_and_a_hubs_name_by_itself(root: Path, asked: list[Any]) -> None:
    file = _half_of_alexnet(root)
    for perceptual, start in ((file, None), ("timm/vgg16.tv_in1k", "someone/vae")):
        training = _training(perceptual=perceptual, start=start)
        run_autoencoder(AutoencoderRun(root=str(root), training=training, keep_reasons=None))
    assert len(asked[0].inputs["perceptual"]) == 16
    assert asked[1].inputs["perceptual"] == "timm/vgg16.tv_in1k"
    assert asked[1].inputs["start"] == asked[1].recipe.training.start == "someone/vae"


def test_lpips_of_a_given_backbone_joins_the_losses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        f"features.{k}": v for k, v in torchvision.models.squeezenet1_1(weights=None).features.state_dict().items()
    }
    torch.save(state, tmp_path / "squeeze.pth")
    training = _training(perceptual=str(tmp_path / "squeeze.pth"), size_px=32)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    _, progress = train_autoencoder(training, images, LocalWorker())
    assert progress.history[-1]["perceptual"] > 0


def test_a_sharded_autoencoder_is_refused() -> None:
    loop = LoopRecipe(steps=1, parallel=ParallelRecipe(sharding="fsdp"))
    with pytest.raises(RecipeError, match="trained with sharding 'ddp'"):
        AutoencoderTraining(loop=loop, size_px=32)
