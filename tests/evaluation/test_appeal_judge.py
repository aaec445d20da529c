"""The appeal judge tells photogenic from other pictures, also blurred ones, and answers to each criterion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata

from emu_ray.base.draws import CANVAS_PX, SEEDS, shrink
from emu_ray.base.judge import blurred
from emu_ray.evaluation.appeal_judge import WEIGHTS, colourfulness, judge_appeal, noise_level
from emu_ray.haystack.render import render
from emu_ray.haystack.world import SCENES, SceneBatch, draw_scenes, join


def _pictures(scenes: SceneBatch) -> np.ndarray:
    return shrink(render(scenes, CANVAS_PX), 64)


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    count = positive.sum()
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (~positive).sum()))


@pytest.fixture(scope="module")
def draw() -> tuple[SceneBatch, np.ndarray]:
    """Half photogenic, half not; not the draw that the bounds were set on."""
    rng = np.random.default_rng([SEEDS["judge_check"], 20])
    scenes = join([draw_scenes(rng, 120, photogenic=False), draw_scenes(rng, 120, photogenic=True)])
    return scenes, _pictures(scenes)


@pytest.fixture(scope="module")
def scores(draw: tuple[SceneBatch, np.ndarray]) -> np.ndarray:
    return judge_appeal(draw[1])[0]


def test_it_ranks_photogenic_above_other_pictures(draw: tuple[SceneBatch, np.ndarray], scores: np.ndarray) -> None:
    assert _auc(scores, draw[0].photogenic) >= 0.90


def test_it_still_does_when_an_autoencoder_would_have_blurred_them(
    draw: tuple[SceneBatch, np.ndarray], scores: np.ndarray
) -> None:
    soft = judge_appeal(blurred(draw[1], 0.8))[0]
    assert _auc(soft, draw[0].photogenic) >= 0.88
    assert abs(soft.mean() - scores.mean()) < 0.05


def test_failing_any_one_criterion_of_the_same_scenes_costs_appeal() -> None:
    good = draw_scenes(np.random.default_rng([SEEDS["judge_check"], 21]), 24, photogenic=True)
    flaws = [("lighting", 1), ("lighting", 2), ("lighting", 3), ("colouring", 1), ("backdrop", 1), ("backdrop", 2)]
    before = judge_appeal(_pictures(good))[0].mean()
    for name, flaw in flaws:
        after = judge_appeal(_pictures(replace(good, **{name: np.full(24, flaw)})))[0].mean()
        assert after < before - 0.1, (name, flaw)
    sunk = replace(good, y=good.y + 0.22, framing=np.full(24, 1))
    tiny = replace(good, radius=good.radius * 0.47, framing=np.full(24, 2))
    for flawed in (sunk, tiny):
        assert judge_appeal(_pictures(flawed))[0].mean() < before - 0.1


def test_a_good_night_is_not_underexposed(draw: tuple[SceneBatch, np.ndarray]) -> None:
    rng = np.random.default_rng([SEEDS["judge_check"], 22])
    day = draw_scenes(rng, 24, photogenic=True)
    night = replace(day, scene=np.full(24, SCENES.index("night")))
    dark = replace(night, lighting=np.full(24, 2))
    (lit, parts), (unlit, dark_parts) = judge_appeal(_pictures(night)), judge_appeal(_pictures(dark))
    assert parts["exposure"].mean() > 0.85
    assert dark_parts["exposure"].mean() < 0.4
    assert lit.mean() > unlit.mean() + 0.3


def test_scores_and_parts_lie_between_0_and_1(draw: tuple[SceneBatch, np.ndarray]) -> None:
    odd = np.stack(
        [np.zeros((64, 64, 3)), np.full((64, 64, 3), 255), np.random.default_rng(0).integers(0, 256, (64, 64, 3))]
    )
    score, parts = judge_appeal(np.concatenate([odd.astype(np.uint8), draw[1][:5]]))
    assert set(parts) == set(WEIGHTS)
    for values in (score, *parts.values()):
        assert values.shape == (8,)
        assert ((values >= 0) & (values <= 1)).all()
    assert score[:3].max() < 0.3


def test_a_picture_is_judged_alike_alone_and_in_company(
    draw: tuple[SceneBatch, np.ndarray], scores: np.ndarray
) -> None:
    assert judge_appeal(draw[1][130:131])[0] == pytest.approx(scores[130:131])


def test_larger_pictures_are_judged_at_64_px(draw: tuple[SceneBatch, np.ndarray], scores: np.ndarray) -> None:
    large = judge_appeal(render(draw[0].take(np.arange(120, 150)), 128))[0]
    assert abs(large.mean() - scores[120:150].mean()) < 0.1


def test_no_pictures_give_no_scores() -> None:
    assert judge_appeal(np.zeros((0, 64, 64, 3), np.uint8))[0].shape == (0,)


def test_noise_level_measures_the_noise_that_was_added() -> None:
    slope = np.linspace(0.3, 0.6, 64)[None, None, :, None] * np.ones((1, 64, 64, 3))
    grain = np.random.default_rng(0).normal(0, 5 / 255, (1, 64, 64, 1))
    assert noise_level((slope + grain).astype(np.float32))[0] == pytest.approx(5, rel=0.1)
    assert noise_level(slope.astype(np.float32))[0] < 0.01


def test_colourfulness_of_grey_is_0_and_of_a_rainbow_high() -> None:
    grey = np.full((1, 8, 8, 3), 0.4, np.float32)
    rainbow = np.zeros((1, 8, 9, 3), np.float32)
    rainbow[:, :, :3, 0] = rainbow[:, :, 3:6, 1] = rainbow[:, :, 6:, 2] = 1
    assert colourfulness(grey)[0] == pytest.approx(0, abs=1e-3)
    assert colourfulness(rainbow)[0] > 82
