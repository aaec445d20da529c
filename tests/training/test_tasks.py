"""Losses and examples: what a batch holds, and values known in closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder
from emu_ray.training.denoising import Corruption, DenoiserTask, LatentExamples
from emu_ray.training.order import sample_rng
from emu_ray.training.reconstruction import ImageExamples, measure_latents, to_signed
from emu_ray.training.text_tasks import ContrastiveTask


def _examples(dropout: float = 0.1, offset: float = 0.0) -> LatentExamples:
    latents = np.random.default_rng(0).normal(size=(20, 2, 3, 3)).astype(np.float16)
    texts = torch.arange(21.0).view(21, 1, 1)
    corruption = Corruption(caption_dropout=dropout, noise_offset=offset, train_steps=100)
    return LatentExamples(latents, 1 + np.arange(20), texts, corruption)


def test_the_stated_share_of_captions_is_dropped_and_the_others_stay_with_their_picture() -> None:
    rows = np.resize(np.arange(20), 4000)
    batch = _examples(0.1).batch(rows, [sample_rng(1, p) for p in range(4000)])
    text = batch["text"].flatten().numpy()
    assert (text == 0).mean() == pytest.approx(0.1, abs=0.02)
    assert (text[text != 0] == 1 + rows[text != 0]).all()
    assert batch["t"].min() >= 0
    assert batch["t"].max() <= 99


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_dropped_share_lies_in_the_binomial_interval_and_takes_the_pooled_features_along(
    rate: float, seed: int
) -> None:
    count = 2000
    told = replace(_examples(rate), pooled=torch.arange(21.0).view(21, 1), time_ids=np.ones((20, 6), np.int32))
    batch = told.batch(np.resize(np.arange(20), count), [sample_rng(seed, p) for p in range(count)])
    dropped = batch["text"].flatten() == 0
    low, high = binom.interval(1 - 1e-5, count, rate)
    assert low <= int(dropped.sum()) <= high
    assert torch.equal(batch["pooled"].flatten() == 0, dropped)
    assert torch.equal(batch["pooled"].flatten(), batch["text"].flatten())
    assert (batch["time_ids"] == 1).all(), "sizes stay known where the caption is dropped"


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_no_dropout_drops_none_and_full_dropout_all(dropout: float, share: float) -> None:
    batch = _examples(dropout).batch(np.arange(20), [sample_rng(1, p) for p in range(20)])
    assert (batch["text"] == 0).float().mean() == share


def test_a_sample_is_the_same_alone_and_in_company() -> None:
    company = _examples(offset=0.1).batch(np.arange(20), [sample_rng(1, p) for p in range(20)])
    alone = _examples(offset=0.1).batch(np.array([13]), [sample_rng(1, 13)])
    assert all(torch.equal(company[k][13], alone[k][0]) for k in alone)


class _Answer(nn.Module):
    """Answers with what it is told."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, noisy: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> _Answer:
        return self

    @property
    def sample(self) -> Tensor:
        return self.answer


def test_the_true_target_has_no_loss_and_an_error_of_1_costs_the_weight_of_its_step() -> None:
    schedule = NoiseSchedule(ScheduleRecipe(train_steps=100))
    batch = _examples().batch(np.arange(6), [sample_rng(1, p) for p in range(6)])
    target = schedule.target(batch["clean"], batch["noise"], batch["t"])
    assert DenoiserTask(_Answer(target), schedule)(batch)["loss"].item() == pytest.approx(0, abs=1e-10)
    off = DenoiserTask(_Answer(target + 1), schedule)(batch)
    assert off["mse"].item() == pytest.approx(1, rel=1e-4)
    assert off["loss"].item() == pytest.approx(schedule.weight(batch["t"]).mean().item(), rel=1e-4)


class _Pairs(nn.Module):
    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images, nn.functional.normalize(nn.functional.one_hot(ids[:, 0], 4).float(), dim=1), torch.tensor(100.0)


def test_pairs_of_one_caption_are_not_each_others_negatives() -> None:
    ids = torch.tensor([[0], [1], [1], [2]])
    own = nn.functional.one_hot(ids[:, 0], 4).float()
    task = ContrastiveTask(_Pairs())
    assert task({"images": own, "ids": ids})["loss"].item() == pytest.approx(0, abs=1e-6)
    assert task({"images": own, "ids": ids})["top1"] == 1
    assert task({"images": own.roll(1, 0), "ids": ids})["loss"].item() > 10


def test_images_come_mirrored_or_not_and_in_range() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    batch = ImageExamples(images, (2, 1, 1)).batch(np.zeros(40, int), [sample_rng(0, p) for p in range(40)])
    straight, mirrored = to_signed(images[:1])[0], to_signed(images[:1])[0].flip(-1)
    same = [torch.equal(i, straight) for i in batch["images"]]
    assert 5 < sum(same) < 35
    assert all(torch.equal(i, mirrored) for i, s in zip(batch["images"], same, strict=True) if not s)
    assert batch["images"].abs().max() <= 1
    assert batch["noise"].shape == (40, 2, 1, 1)


@torch.no_grad()
def test_measured_latents_have_mean_0_and_deviation_1() -> None:
    torch.manual_seed(0)
    recipe = AutoencoderRecipe(
        latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
    )
    network = FourierAutoencoder.build(recipe).eval()
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    measure_latents(network, images, batch_size=4)
    latents = network.normalize(network.moments(to_signed(images))[0])
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(3), atol=1e-4)
