"""The shipped small CLIP and heads on a fresh draw of the haystack; skipped where the base hasn't been made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emu_ray.curation.clip_scorer import ClipMeasures, ClipScorer
from emu_ray.haystack.defects import offensive_badge
from emu_ray.haystack.render import render
from emu_ray.haystack.world import SCENE_PHRASES, SceneBatch, captions, draw_scenes
from emu_ray.stations.folders import base_folder

HEAD = base_folder() / "heads" / "aesthetic.safetensors"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(HEAD).is_file(), reason=f"no shipped base at {base_folder()}: `make base` makes it"),
]


@pytest.fixture(scope="module")
def drawn() -> tuple[SceneBatch, ClipMeasures, ClipMeasures]:
    """(scenes, measures, measures of the same pictures with a badge and the next picture's caption) of 300 pictures."""
    from jobs.score import SMALL_CLIP

    rng = np.random.default_rng(20261122)
    scenes = draw_scenes(rng, 300)
    pictures, lines = list(render(scenes, 96)), captions(scenes)
    scorer = ClipScorer(SMALL_CLIP)
    badged = [offensive_badge(p, rng) for p in pictures]
    return scenes, scorer.measure(pictures, lines), scorer.measure(badged, lines[1:] + lines[:1])


def above(better: np.ndarray, worse: np.ndarray) -> float:
    """The area under the ROC curve: how often a better one scores above a worse one."""
    return float((better[:, None] > worse[None]).mean())


def test_photogenic_pictures_score_above_ordinary_ones(drawn: tuple[SceneBatch, ClipMeasures, ClipMeasures]) -> None:
    scenes, found, _ = drawn
    assert found.aesthetic is not None
    assert above(found.aesthetic[scenes.photogenic], found.aesthetic[~scenes.photogenic]) > 0.93


def test_badges_are_probable_and_clean_pictures_are_not(drawn: tuple[SceneBatch, ClipMeasures, ClipMeasures]) -> None:
    _, clean, badged = drawn
    assert clean.offensive is not None and badged.offensive is not None
    assert (badged.offensive > 0.5).mean() > 0.9 and (clean.offensive > 0.5).mean() < 0.02


def test_own_captions_are_nearer_than_others(drawn: tuple[SceneBatch, ClipMeasures, ClipMeasures]) -> None:
    _, own, others = drawn
    assert above(own.similarity, others.similarity) > 0.97


def test_the_concept_is_the_scene(drawn: tuple[SceneBatch, ClipMeasures, ClipMeasures]) -> None:
    scenes, found, _ = drawn
    assert np.mean([c == SCENE_PHRASES[s] for c, s in zip(found.concept, scenes.scene, strict=True)]) > 0.95
