"""Identities that win, tie and lose shares obey."""

from __future__ import annotations

import numpy as np
import pytest

from emu_ray.errors import InputError
from emu_ray.evaluation.preference import compare, from_outcomes


def _study(seed: int, n_prompts: int = 40, seeds: int = 3, lift: float = 0.5) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(n_prompts), seeds)
    hardness = rng.normal(size=n_prompts)[prompts]
    return lift + hardness + rng.normal(size=prompts.size), rng.normal(size=prompts.size), prompts


def test_shares_sum_to_100_and_intervals_hold_the_estimate() -> None:
    a, b, prompts = _study(1)
    p = compare(a, b, prompts, tie_margin=0.2, seed=0)
    assert p.win + p.tie + p.lose == pytest.approx(100)
    assert p.ci95[0] < p.win < p.ci95[1]
    assert p.win_minus_lose_ci95[0] < p.win_minus_lose < p.win_minus_lose_ci95[1]
    assert (p.n_pairs, p.n_prompts) == (120, 40)


def test_swapping_the_sides_swaps_win_and_lose() -> None:
    a, b, prompts = _study(2)
    p, q = compare(a, b, prompts, tie_margin=0.3), compare(b, a, prompts, tie_margin=0.3)
    assert (p.win, p.tie, p.lose) == (q.lose, q.tie, q.win)
    assert p.win_minus_lose_ci95 == pytest.approx((-q.win_minus_lose_ci95[1], -q.win_minus_lose_ci95[0]))
    assert p.sign_test_p == q.sign_test_p


def test_equal_scores_are_all_ties_and_never_significant() -> None:
    p = compare(np.ones(6), np.ones(6), np.arange(6))
    assert (p.win, p.tie, p.lose, p.sign_test_p) == (0, 100, 0, 1)
    assert p.is_not_significantly_worse


def test_a_lead_of_exactly_the_margin_is_a_tie() -> None:
    p = compare([1.5, 1.75, 0.0], [1.0, 1.0, 0.75], [0, 1, 2], tie_margin=0.5)
    assert (p.win, p.tie, p.lose) == pytest.approx((100 / 3, 100 / 3, 100 / 3))


def test_sign_test_of_ten_straight_wins_is_two_to_the_minus_nine() -> None:
    assert compare(np.ones(10), np.zeros(10), np.arange(10)).sign_test_p == pytest.approx(2**-9)


def test_interval_covers_the_truth_about_19_times_in_20_when_prompts_cluster() -> None:
    rng = np.random.default_rng(7)
    covered, naive_covered, trials, n_prompts, seeds = 0, 0, 150, 60, 6
    for trial in range(trials):
        chance = rng.beta(2.0, 2.0, size=n_prompts)  # mean 0.5: the true win share is 50 %
        wins = rng.random((n_prompts, seeds)) < chance[:, None]
        prompts = np.repeat(np.arange(n_prompts), seeds)
        p = from_outcomes(np.where(wins, 1, -1).ravel(), prompts, seed=trial)
        covered += p.ci95[0] <= 50 <= p.ci95[1]
        half_width = 196 * np.sqrt(0.25 / wins.size)
        naive_covered += abs(p.win - 50) <= half_width
    assert covered / trials >= 0.89
    assert covered > naive_covered + 10  # an interval that takes pairs as independent is too narrow here


def test_same_seed_gives_the_same_interval() -> None:
    a, b, prompts = _study(3)
    assert compare(a, b, prompts, seed=5) == compare(a, b, prompts, seed=5)


def test_a_single_prompt_gives_no_false_certainty() -> None:
    p = compare(np.ones(8), np.zeros(8), np.zeros(8, dtype=int))
    assert p.win == 100
    assert (p.ci95, p.win_minus_lose_ci95, p.n_prompts) == ((0, 100), (-100, 100), 1)


def test_clear_loss_is_significantly_worse() -> None:
    assert not compare(np.zeros(50), np.ones(50), np.arange(50)).is_not_significantly_worse


@pytest.mark.parametrize(
    ("a", "b", "ids", "said"),
    [
        ([], [], [], "at least one pair"),
        ([1.0], [1.0, 2.0], [0], "equally long"),
        ([float("nan")], [1.0], [0], "finite"),
    ],
)
def test_bad_scores_are_refused_in_a_sentence(a: list[float], b: list[float], ids: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare(a, b, ids)


def test_negative_margin_is_refused() -> None:
    with pytest.raises(InputError, match="margin"):
        compare([1.0], [0.0], [0], tie_margin=-1)
