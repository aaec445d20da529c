"""The autoencoder's losses: values known in closed form, and two players that leave each other's weights alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder
from emu_ray.models.discriminator import DiscriminatorRecipe, PatchDiscriminator
from emu_ray.training.reconstruction import (
    AdversarialRecipe,
    AutoencoderTask,
    DiscriminatorTask,
    adaptive_weight,
    hinge_loss,
)

SIZES = AutoencoderRecipe(
    latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
)
ADVERSARY = AdversarialRecipe(
    weight=0.5, start_step=10, discriminator=DiscriminatorRecipe(width=8, halvings=2, norm_num_groups=4)
)


def _network() -> FourierAutoencoder:
    torch.manual_seed(0)
    return FourierAutoencoder.build(SIZES)


def _task(adversary: AdversarialRecipe | None = ADVERSARY, step: int = 10) -> AutoencoderTask:
    task = AutoencoderTask(_network(), kl_weight=1e-3, adversary=adversary)
    task.step = step
    return task


def _batch(count: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"images": torch.rand(count, 3, 16, 16) * 2 - 1, "noise": torch.randn(count, 4, 8, 8)}


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def test_the_hinge_loss_has_its_closed_form() -> None:
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, made).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_norms() -> None:
    last = nn.Parameter(torch.tensor([3.0, 1.0]))
    likeness, adversarial = last @ torch.tensor([3.0, 4.0]), last @ torch.tensor([0.0, 2.0])  # norms 5 and 2
    weight = adaptive_weight(likeness, adversarial, last)
    assert weight.item() == pytest.approx(2.5, rel=1e-5)
    assert not weight.requires_grad
    assert adaptive_weight(likeness, 0 * adversarial, last).item() == 1e4


def test_the_weight_in_the_loss_is_that_of_two_separate_backward_passes() -> None:
    task, batch = _task(), _batch()
    losses = task(batch)
    norms = []
    for part in ("likeness", "adversarial"):
        other = _task()
        mean, std = other.network.moments(batch["images"])
        made = other.network.decode_raw(mean + std * batch["noise"])
        off = made - batch["images"]
        likeness = off.abs().mean() + off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
        judge = task.opponent.network
        (likeness if part == "likeness" else -judge(made).mean()).backward()
        norms.append(other.network.last_layer.grad.norm())
    weight = 0.5 * norms[0] / norms[1]
    assert losses["adversarial_weight"].item() == pytest.approx(weight.item(), rel=1e-3)
    plain = _task(None)(batch)
    assert losses["loss"].item() == pytest.approx((plain["loss"] + weight * losses["adversarial"]).item(), rel=1e-4)
    assert torch.equal(losses["made"], made)


def test_before_the_start_the_loss_is_the_one_without_an_adversary() -> None:
    early, without = _task(step=9), _task(None, step=9)
    losses, expected = early(_batch()), without(_batch())
    assert torch.equal(losses["loss"], expected["loss"])
    assert losses["adversarial"] == losses["adversarial_weight"] == 0
    losses["loss"].backward()
    expected["loss"].backward()
    assert all(torch.equal(a, b) for a, b in zip(_gradients(early.network), _gradients(without.network), strict=True))
    assert "made" not in expected
    started = _task(step=10)(_batch())
    assert set(started) == set(losses)
    assert started["loss"] != losses["loss"]


def test_before_the_start_the_discriminator_stays_as_it_is() -> None:
    task = DiscriminatorTask(PatchDiscriminator(ADVERSARY.discriminator), start_step=10)
    found = task({**_batch(), "made": torch.zeros(2, 3, 16, 16)})
    found["loss"].backward()
    assert found["loss"] == 0
    assert len(_gradients(task.network)) == len(list(task.network.parameters()))  # DDP waits for each
    assert not any(g.any() for g in _gradients(task.network))
    task.step = 10
    assert task({**_batch(), "made": torch.zeros(2, 3, 16, 16)}).keys() == found.keys()


def test_neither_player_leaves_a_gradient_on_the_other() -> None:
    task = _task()
    losses = task(_batch())
    losses["loss"].backward()
    judge = task.opponent
    assert _gradients(task.network)
    assert not _gradients(judge.network)
    assert all(p.requires_grad for p in judge.network.parameters())
    task.zero_grad(set_to_none=True)
    judge.step = 10
    judge({**_batch(), "made": losses["made"].detach()})["loss"].backward()
    assert _gradients(judge.network)
    assert not _gradients(task.network)
    mine = {id(p) for p in task.network.parameters()}
    assert not mine & {id(p) for p in judge.parameters()}


def test_the_discriminators_word_reaches_the_first_layer() -> None:
    first = []
    for step in (9, 10):
        task = _task(step=step)
        task(_batch())["loss"].backward()
        first.append(task.network.vae.encoder.conv_in.weight.grad)
    assert not torch.allclose(first[0], first[1], rtol=1e-2)


def test_perceptual_distance_counts_by_its_weight_and_in_the_ratio() -> None:
    class Brightness(nn.Module):
        def forward(self, made: Tensor, images: Tensor) -> Tensor:
            return (made - images).mean((1, 2, 3)).abs()

    batch = _batch()
    plain = _task(None)(batch)
    task = AutoencoderTask(_network(), kl_weight=1e-3, perceptual=Brightness(), perceptual_weight=3.0)  # type: ignore[arg-type]
    found = task(batch)
    assert found["loss"].item() == pytest.approx((plain["loss"] + 3 * found["perceptual"]).item(), rel=1e-5)
    assert found["perceptual"] > 0


def test_a_game_of_some_steps_makes_pictures_that_the_discriminator_takes_for_real() -> None:
    task = _task(AdversarialRecipe(weight=1.0, start_step=0, discriminator=ADVERSARY.discriminator), step=0)
    judge, batch = task.opponent, _batch()
    ours = torch.optim.AdamW(task.network.parameters(), lr=1e-3)
    theirs = torch.optim.AdamW(judge.network.parameters(), lr=1e-3)
    first: dict[str, float] = {}
    for _ in range(30):
        losses = task(batch)
        ours.zero_grad()
        losses["loss"].backward()
        ours.step()
        found = judge({**batch, "made": losses["made"].detach()})
        theirs.zero_grad()
        found["loss"].backward()
        theirs.step()
        first = first or {k: v.item() for k, v in {**losses, **found}.items() if k != "made"}
    assert losses["reconstruction"].item() < 0.8 * first["reconstruction"]
    assert found["loss"].item() < first["loss"]
