"""Closed forms of the noise schedule, and a sampler that recovers a known distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe, offset_noise, schedule_of
from emu_ray.errors import InputError, RecipeError

EPSILON = ScheduleRecipe(prediction="epsilon", zero_terminal_snr=False)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seed = torch.Generator().manual_seed(0)
    return (
        torch.randn(6, 4, 3, 3, generator=seed),
        torch.randn(6, 4, 3, 3, generator=seed),
        torch.tensor([0, 1, 250, 500, 900, 998]),
    )


@pytest.mark.parametrize("recipe", [ScheduleRecipe(), EPSILON, ScheduleRecipe(zero_terminal_snr=False)])
def test_signal_and_noise_are_a_rotation_and_the_signal_falls(recipe: ScheduleRecipe) -> None:
    schedule = NoiseSchedule(recipe)
    assert torch.allclose(schedule.signal**2 + schedule.noise**2, torch.ones(1000), atol=1e-6)
    assert (schedule.signal.diff() < 0).all()


def test_zero_terminal_snr_leaves_no_signal_at_the_last_step() -> None:
    schedule = NoiseSchedule(ScheduleRecipe())
    assert schedule.signal[-1] == 0
    assert schedule.noise[-1] == 1
    assert schedule.signal[0] == NoiseSchedule(ScheduleRecipe(zero_terminal_snr=False)).signal[0]


def test_v_and_z_give_back_the_clean_sample(batch: tuple[torch.Tensor, ...]) -> None:
    clean, noise, t = batch
    schedule = NoiseSchedule(ScheduleRecipe())
    noisy, v = schedule.add_noise(clean, noise, t), schedule.target(clean, noise, t)
    signal, strength = (s[t].view(-1, 1, 1, 1) for s in (schedule.signal, schedule.noise))
    assert torch.allclose(signal * noisy - strength * v, clean, atol=1e-5)
    assert torch.allclose(strength * noisy + signal * v, noise, atol=1e-5)


def test_epsilon_and_z_give_back_the_clean_sample(batch: tuple[torch.Tensor, ...]) -> None:
    clean, noise, t = batch
    schedule = NoiseSchedule(EPSILON)
    signal, strength = (s[t].view(-1, 1, 1, 1) for s in (schedule.signal, schedule.noise))
    guess = (schedule.add_noise(clean, noise, t) - strength * schedule.target(clean, noise, t)) / signal
    assert torch.allclose(guess, clean, atol=2e-4)


def test_our_noise_agrees_with_the_sampler_of_diffusers(batch: tuple[torch.Tensor, ...]) -> None:
    clean, noise, t = batch
    for recipe in (ScheduleRecipe(), EPSILON):
        schedule = NoiseSchedule(recipe)
        theirs = schedule.scheduler()
        assert torch.allclose(schedule.add_noise(clean, noise, t), theirs.add_noise(clean, noise, t), atol=1e-5)
        assert torch.allclose(
            theirs.get_velocity(clean, noise, t),
            NoiseSchedule(ScheduleRecipe(zero_terminal_snr=recipe.zero_terminal_snr)).target(clean, noise, t),
            atol=1e-5,
        )


def test_min_snr_weights_have_their_closed_form() -> None:
    t = torch.arange(999)
    for recipe in (replace(r, min_snr_gamma=5.0) for r in (ScheduleRecipe(), EPSILON)):
        schedule = NoiseSchedule(recipe)
        snr = (schedule.signal[t] / schedule.noise[t]).double() ** 2
        per_clean = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))  # weight of an error in z_0
        share = snr + 1 if recipe.prediction == "v_prediction" else snr  # of it, an error in the target makes 1 / share
        assert torch.allclose(schedule.weight(t).double(), per_clean / share, rtol=1e-4)


def test_min_snr_would_never_train_the_last_step_of_zero_terminal_snr() -> None:
    last = NoiseSchedule(ScheduleRecipe(min_snr_gamma=5.0)).weight(torch.tensor([999]))
    assert last.item() == pytest.approx(0, abs=1e-6)


def test_by_default_all_steps_weigh_alike() -> None:
    assert torch.equal(NoiseSchedule(ScheduleRecipe()).weight(torch.arange(1000)), torch.ones(1000))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prediction": "epsilon"}, "use prediction 'v_prediction'"),
        ({"prediction": "epsilon", "min_snr_gamma": 5.0}, "use prediction 'v_prediction'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma .* above 0, or be None, found 0.0"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma"),
        ({"min_snr_gamma": float("nan")}, "min_snr_gamma"),
        ({"beta_start": 0.012, "beta_end": 0.012}, "betas .* must rise between 0 and 1"),
        ({"beta_start": 0.02}, "betas .* must rise"),
        ({"beta_start": 0.0}, "betas .* must rise"),
        ({"beta_end": 1.0}, "betas .* must rise"),
        ({"train_steps": 1}, "train_steps .* at least 2"),
    ],
)
def test_what_is_undefined_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ScheduleRecipe(**fields)


@pytest.mark.parametrize("train_steps", [10, 1000])
def test_betas_are_linear_in_their_roots_as_diffusers_has_them(train_steps: int) -> None:
    recipe = replace(EPSILON, train_steps=train_steps)
    schedule = NoiseSchedule(recipe)
    product, by_hand = 1.0, []
    for i in range(train_steps):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / (train_steps - 1)
        product *= 1 - root**2
        by_hand.append(product)
    assert torch.allclose(schedule.signal.double() ** 2, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5)
    theirs = DDPMScheduler(train_steps, 0.00085, 0.012, beta_schedule="scaled_linear")
    assert torch.allclose(schedule.signal**2, theirs.alphas_cumprod, rtol=1e-4)


def test_zero_terminal_snr_is_rescaled_as_diffusers_does() -> None:
    betas = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear").betas
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert torch.allclose(NoiseSchedule(ScheduleRecipe()).signal ** 2, theirs, atol=1e-5)


def test_min_snr_weights_are_those_of_diffusers_scripts() -> None:
    t = torch.arange(1000)
    schedule = NoiseSchedule(replace(EPSILON, min_snr_gamma=5.0))
    snr = compute_snr(DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear"), t)
    theirs = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / snr
    assert torch.allclose(schedule.weight(t), theirs, rtol=1e-3)
    v = replace(EPSILON, prediction="v_prediction", min_snr_gamma=5.0)
    assert torch.allclose(NoiseSchedule(v).weight(t), theirs * snr / (snr + 1), rtol=1e-3)


def test_an_error_in_v_is_one_in_epsilon_over_the_signal_and_min_snr_weighs_both_alike(
    batch: tuple[torch.Tensor, ...],
) -> None:
    """For a guess of z_0 at a fixed z_t: e_eps = -(a / b) e_0 and e_v = -e_0 / b, so e_eps = a e_v, a the signal and b the noise."""
    clean, noise, t = batch
    v = NoiseSchedule(replace(EPSILON, prediction="v_prediction", min_snr_gamma=5.0))
    epsilon = NoiseSchedule(replace(EPSILON, min_snr_gamma=5.0))
    a, b = (s[t].view(-1, 1, 1, 1).double() for s in (v.signal, v.noise))
    noisy = a * clean + b * noise
    guess = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    guessed_noise = (noisy - a * guess) / b
    guessed_v = a * guessed_noise - b * guess
    errors = guessed_noise - epsilon.target(clean, noise, t), guessed_v - v.target(clean, noise, t)
    assert torch.allclose(errors[0], a * errors[1], atol=1e-4)
    weighted = [s.weight(t) * e.square().mean((1, 2, 3)) for s, e in zip((epsilon, v), errors, strict=True)]
    assert torch.allclose(weighted[0], weighted[1], rtol=2e-2)


@pytest.mark.parametrize("recipe", [ScheduleRecipe(), EPSILON, ScheduleRecipe(zero_terminal_snr=False, train_steps=50)])
def test_a_saved_scheduler_means_the_schedule_that_it_was_made_of(recipe: ScheduleRecipe) -> None:
    assert schedule_of(NoiseSchedule(recipe).scheduler().config, "here") == recipe


def test_a_schedule_that_we_can_not_train_says_what_it_is() -> None:
    with pytest.raises(InputError, match="here: expected beta_schedule scaled_linear, found 'linear'"):
        schedule_of(EulerDiscreteScheduler().config, "here")


def test_offset_noise_has_mean_0_and_its_covariance_in_closed_form() -> None:
    """E = 0; Cov of two pixels of a channel = strength^2, of a pixel with itself 1 + strength^2, of two channels 0."""
    seed, strength, count = torch.Generator().manual_seed(4), 0.3, 200_000
    shifted = offset_noise(
        torch.randn(count, 2, 1, 2, generator=seed), torch.randn(count, 2, generator=seed), strength
    ).reshape(count, 4)
    expected = torch.eye(4) + strength**2 * torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert torch.allclose(shifted.mean(0), torch.zeros(4), atol=5 * (1 + strength**2) ** 0.5 / count**0.5)
    assert torch.allclose(shifted.T.cov(), expected, atol=0.015)


def test_offset_noise_has_the_variance_of_its_two_parts_and_one_constant_a_channel() -> None:
    seed = torch.Generator().manual_seed(1)
    noise, constant = torch.randn(4000, 4, 4, 4, generator=seed), torch.randn(4000, 4, generator=seed)
    shifted = offset_noise(noise, constant, 0.5)
    assert shifted.var().item() == pytest.approx(1 + 0.5**2, rel=0.02)
    assert shifted.mean((2, 3)).var().item() == pytest.approx(1 / 16 + 0.5**2, rel=0.05)
    assert torch.equal(offset_noise(noise, constant, 0.0), noise)


@pytest.mark.parametrize("recipe", [ScheduleRecipe(), EPSILON])
def test_ddim_with_the_exact_answer_for_a_gaussian_recovers_its_moments(recipe: ScheduleRecipe) -> None:
    """Data N(m, s^2): E[z_0 | z_t] = m + a s^2 (z_t - a m) / (a^2 s^2 + b^2), a the signal and b the noise."""
    mean, deviation = 0.7, 0.4
    schedule = NoiseSchedule(recipe)
    sampler = schedule.scheduler()
    sampler.set_timesteps(250)
    z = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    for t in sampler.timesteps:
        a, b = schedule.signal[t], schedule.noise[t]
        clean = mean + a * deviation**2 * (z - a * mean) / (a**2 * deviation**2 + b**2)
        noise = (z - a * clean) / b
        answer = noise if recipe.prediction == "epsilon" else a * noise - b * clean
        z = sampler.step(answer, t, z).prev_sample
    assert z.mean().item() == pytest.approx(mean, abs=0.02)
    assert z.std().item() == pytest.approx(deviation, abs=0.02)
