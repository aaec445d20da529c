"""Closed forms of the noise schedule, and a sampler that recovers a known distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe, offset_noise
from emu_ray.errors import RecipeError

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


def test_epsilon_prediction_at_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(RecipeError, match="v_prediction"):
        NoiseSchedule(ScheduleRecipe(prediction="epsilon"))


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
