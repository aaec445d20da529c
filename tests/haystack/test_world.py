"""What scenes and captions promise."""

from __future__ import annotations

import numpy as np
import pytest

from emu_ray.haystack.render import render
from emu_ray.haystack.world import (
    COLOURS,
    MATERIALS,
    POSITIONS,
    SCENES,
    SHAPES,
    SceneBatch,
    Subject,
    captions,
    draw_scenes,
    join,
    read_caption,
)


@pytest.fixture(scope="module")
def scenes() -> SceneBatch:
    return draw_scenes(np.random.default_rng(11), 20_000)


def test_about_one_in_ten_is_photogenic(scenes: SceneBatch) -> None:
    assert 0.08 <= scenes.photogenic.mean() <= 0.12


def test_there_are_thousands_of_distinct_captions(scenes: SceneBatch) -> None:
    assert len(set(captions(scenes))) > 10_000


def test_a_caption_reads_back_as_what_was_drawn(scenes: SceneBatch) -> None:
    part = scenes.take(np.arange(2000))
    for i, line in enumerate(captions(part)):
        content = read_caption(line)
        assert content is not None
        assert content.scene == SCENES[part.scene[i]]
        assert content.subjects == tuple(
            Subject(SHAPES[part.shape[i, k]], MATERIALS[part.material[i, k]], COLOURS[part.colour[i, k]])
            for k in range(part.objects[i])
        )
        assert content.position == (POSITIONS[part.position[i]] if part.objects[i] == 1 else None)


@pytest.mark.parametrize(
    "line", ["", "a dog on a sofa", "a red metal ball", "in a meadow", "a red plush ball in a meadow"]
)
def test_a_sentence_of_another_world_reads_as_none(line: str) -> None:
    assert read_caption(line) is None


def test_captions_never_speak_of_quality() -> None:
    rng = np.random.default_rng(1)
    good, bad = (set(" ".join(captions(draw_scenes(rng, 500, photogenic=p))).split()) for p in (True, False))
    assert good == bad


@pytest.mark.parametrize("photogenic", [True, False])
def test_a_draw_of_one_kind_holds_that_kind_only(photogenic: bool) -> None:
    drawn = draw_scenes(np.random.default_rng(3), 50, photogenic=photogenic)
    assert len(drawn) == 50
    assert (drawn.photogenic == photogenic).all()


def test_two_objects_differ_in_colour_and_stand_from_left_to_right(scenes: SceneBatch) -> None:
    two = scenes.take(scenes.objects == 2)
    assert (two.colour[:, 0] != two.colour[:, 1]).all()
    assert (two.x[:, 0] < two.x[:, 1]).all()


def test_a_picture_depends_on_its_own_numbers_alone(scenes: SceneBatch) -> None:
    company = scenes.take(np.arange(70))
    alone = scenes.take(np.array([66]))
    assert np.array_equal(render(company, 32)[66], render(alone, 32)[0])


def test_taking_all_parts_and_joining_them_changes_nothing(scenes: SceneBatch) -> None:
    part = scenes.take(np.arange(6))
    again = join([part.take(np.arange(2)), part.take(np.arange(2, 6))])
    assert all(np.array_equal(a, b) for a, b in zip(vars(part).values(), vars(again).values(), strict=True))


def test_a_side_below_8_px_is_refused(scenes: SceneBatch) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        render(scenes.take(np.arange(1)), 7)
