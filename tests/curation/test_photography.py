"""The photography scores on crafted pictures: each is moved by what it is named for."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from emu_ray.curation.photography import SUBSCORES, photography, saliency


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A sharp coloured disc at a crossing of the thirds, before a smooth bluish background."""
    height, width = 240, 360
    ramp = np.linspace(40, 190, width, dtype=np.float32)
    picture = np.stack([np.tile(ramp * f, (height, 1)) for f in (0.7, 0.9, 1.2)], axis=2).clip(0, 250).astype(np.uint8)
    cv2.circle(picture, (120, 80), 30, (230, 60, 30), -1)
    for offset in range(-24, 25, 6):
        cv2.line(picture, (120 + offset, 56), (120 + offset, 104), (20, 20, 20), 2)
    return picture


def test_every_score_is_between_0_and_1_also_for_odd_pictures() -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 3), (1, 500, 3), (700, 2, 3), (64, 64, 3)]
    for picture in [*(rng.integers(0, 256, s, dtype=np.uint8) for s in shapes), np.zeros((9, 9, 3), np.uint8)]:
        found = photography(picture)
        assert all(0 <= getattr(found, name) <= 1 for name in SUBSCORES), found
        assert 0 <= found.overall <= 1


def test_a_dark_and_an_overexposed_picture_are_worse_exposed(scene: np.ndarray) -> None:
    good = photography(scene).exposure
    assert good > 0.9
    assert photography(scene // 10).exposure < 0.3
    assert photography(np.minimum(scene.astype(int) * 6, 255).astype(np.uint8)).exposure < 0.3


def test_flattening_the_tones_lowers_range_and_contrast(scene: np.ndarray) -> None:
    good, flat = photography(scene), photography(scene // 6 + 100)
    assert flat.dynamic_range < 0.4 * good.dynamic_range and flat.contrast < 0.4 * good.contrast


def test_grey_has_no_colour(scene: np.ndarray) -> None:
    grey = np.repeat(cv2.cvtColor(scene, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    assert photography(grey).colourfulness == 0 and photography(scene).colourfulness > 0.3


def test_blur_lowers_sharpness(scene: np.ndarray) -> None:
    assert photography(cv2.GaussianBlur(scene, (0, 0), 5)).sharpness < 0.6 * photography(scene).sharpness


def test_a_sharp_subject_before_a_soft_background_has_depth(scene: np.ndarray) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, scene.shape, dtype=np.uint8)
    assert photography(scene).subject_depth > 0.7
    assert abs(photography(noisy).subject_depth - 0.5) < 0.1


def test_a_subject_at_the_thirds_beats_one_at_the_edge(scene: np.ndarray) -> None:
    moved = np.roll(scene, (130, 215), axis=(0, 1))
    at_thirds, at_edge = photography(scene), photography(moved)
    assert at_thirds.thirds > 0.8 > at_edge.thirds
    assert at_edge.balance < at_thirds.balance


def test_salience_lies_on_the_subject(scene: np.ndarray) -> None:
    found = saliency(cv2.cvtColor(scene, cv2.COLOR_RGB2GRAY))
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert abs(x / 64 - 1 / 3) < 0.12 and abs(y / 64 - 1 / 3) < 0.12
    assert found.sum() == pytest.approx(1, abs=1e-4)
