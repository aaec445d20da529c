"""Win, tie and lose shares of two models shown the same prompts, with honest intervals.

One pair is one prompt and one seed, seen by a judge that gives each side a score, or by five people who vote. Pairs
that share a prompt are alike, so the unit of resampling is the prompt. This file does not judge pictures and does not
read stations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from emu_ray.errors import InputError

RESAMPLES = 10_000
_CHUNK_DRAWS = 4_000_000  # prompts drawn at once: 32 MB of indices


@dataclass(frozen=True, kw_only=True)
class Preference:
    """How often side A is preferred to side B; shares in percent, win + tie + lose = 100.

    `ci95` bounds the win share, `win_minus_lose_ci95` the difference, both in percentage points, by a bootstrap over
    prompts. With a single prompt there is nothing to resample: both intervals are then as wide as can be.
    `sign_test_p` is the exact two-sided binomial test of wins against losses, ties left out; it takes pairs as
    independent.
    """

    win: float
    tie: float
    lose: float
    ci95: tuple[float, float]
    win_minus_lose_ci95: tuple[float, float]
    n_pairs: int
    n_prompts: int
    sign_test_p: float

    @property
    def win_minus_lose(self) -> float:
        """Percentage points, -100 to 100."""
        return self.win - self.lose

    @property
    def is_not_significantly_worse(self) -> bool:
        """True when the interval of win minus lose reaches 0 or above."""
        return self.win_minus_lose_ci95[1] >= 0.0


def compare(
    scores_a: ArrayLike, scores_b: ArrayLike, prompt_ids: ArrayLike, *, tie_margin: float = 0.0, seed: int = 0
) -> Preference:
    """Preference for A over B from one score a side and pair, higher is better.

    A wins a pair when its score exceeds B's by more than `tie_margin`, loses it when B's exceeds A's by more than that.
    The three arrays are 1-D and equally long. InputError: no pair, unequal lengths, a score that is not finite, a
    negative margin.
    """
    a = np.asarray(scores_a, dtype=np.float64)
    b = np.asarray(scores_b, dtype=np.float64)
    ids = np.asarray(prompt_ids)
    if not (a.ndim == b.ndim == ids.ndim == 1 and len(a) == len(b) == len(ids)):
        raise InputError(f"a preference needs three equally long lists, got shapes {a.shape}, {b.shape}, {ids.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("a preference needs finite scores, got NaN or infinity")
    if not (np.isfinite(tie_margin) and tie_margin >= 0):
        raise InputError(f"the tie margin must be 0 or more, got {tie_margin}")
    margin = a - b
    outcomes = (margin > tie_margin).astype(np.int64) - (margin < -tie_margin).astype(np.int64)
    return from_outcomes(outcomes, ids, seed=seed)


def from_outcomes(outcomes: ArrayLike, prompt_ids: ArrayLike, *, seed: int = 0) -> Preference:
    """Preference from pairs already decided: +1 A is preferred, 0 tie, -1 B is preferred.

    InputError: no pair, or lists of unequal length.
    """
    decided = np.asarray(outcomes, dtype=np.int64)
    ids = np.asarray(prompt_ids)
    if decided.size == 0 or decided.shape != ids.shape:
        raise InputError(f"a preference needs at least one pair, each with a prompt; got {decided.size} and {ids.size}")
    wins, losses = int((decided > 0).sum()), int((decided < 0).sum())
    n_pairs = decided.size
    _, cluster = np.unique(ids, return_inverse=True)
    n_prompts = int(cluster.max()) + 1
    per_prompt = np.stack(
        [np.bincount(cluster), np.bincount(cluster, decided > 0), np.bincount(cluster, decided < 0)], axis=1
    ).astype(np.float64)
    win_ci, difference_ci = (0.0, 100.0), (-100.0, 100.0)
    if n_prompts > 1:
        shares = _bootstrap_shares(per_prompt, seed)
        win_ci = _interval(shares[:, 0])
        difference_ci = _interval(shares[:, 0] - shares[:, 1])
    win, lose = 100.0 * wins / n_pairs, 100.0 * losses / n_pairs
    return Preference(
        win=win,
        tie=100.0 * (n_pairs - wins - losses) / n_pairs,
        lose=lose,
        ci95=win_ci,
        win_minus_lose_ci95=difference_ci,
        n_pairs=n_pairs,
        n_prompts=n_prompts,
        sign_test_p=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )


def _bootstrap_shares(per_prompt: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Win and lose shares in percent, (RESAMPLES, 2), of prompts drawn with replacement.

    `per_prompt` is (P, 3): pairs, wins, losses. A resample's share is its wins over its pairs, so that prompts with
    more pairs weigh more, as they do in the estimate itself.
    """
    rng = np.random.default_rng(seed)
    n_prompts = len(per_prompt)
    rows = max(1, _CHUNK_DRAWS // n_prompts)
    shares = np.empty((RESAMPLES, 2))
    for start in range(0, RESAMPLES, rows):
        stop = min(start + rows, RESAMPLES)
        totals = per_prompt[rng.integers(n_prompts, size=(stop - start, n_prompts))].sum(axis=1)
        shares[start:stop] = 100.0 * totals[:, 1:] / totals[:, :1]
    return shares


def _interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
