"""The policy: one crafted pair a reason, the order of reasons, and the funnel's sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.curation.policy import REASONS, SelectionPolicy, decide, funnel
from emu_ray.errors import RecipeError

POLICY = SelectionPolicy(min_short_side_px=64)
NOTHING_MEASURED = dict.fromkeys(
    ("offensive", "aesthetic", "clip_similarity", "embedding", "concept", "phash", "text_words", "text_area")
)
Make = Callable[..., pa.Table]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, ""),
        ({"decode_error": "truncated", "gate_reason": "undecodable", **NOTHING_MEASURED}, "undecodable"),
        ({"width_px": None, "height_px": None, "decode_error": "no image", **NOTHING_MEASURED}, "undecodable"),
        ({"has_caption": False}, "empty_caption"),
        ({"width_px": 63}, "too_small"),
        ({"height_px": 201}, "extreme_aspect"),
        ({"offensive": 0.51}, "offensive"),
        ({"text_words": 3}, "overlaid_text"),
        ({"text_area": 0.06}, "overlaid_text"),
        ({"clip_similarity": 0.19}, "low_clip_similarity"),
        ({"aesthetic": 4.9}, "low_aesthetic"),
        ({"gate_reason": "too_small", **NOTHING_MEASURED}, "too_small"),
        ({"width_px": 63, "offensive": 0.9, "aesthetic": 1.0}, "too_small"),
        ({"offensive": 0.9, "text_words": 9}, "offensive"),
    ],
)
def test_a_pair_gets_the_first_reason_that_fails(make_scores: Make, row: dict[str, object], reason: str) -> None:
    assert decide(make_scores({}, row), POLICY).reasons.tolist() == ["", reason]


@pytest.mark.parametrize(
    "row",
    [
        {"width_px": 64},
        {"height_px": 200},
        {"offensive": 0.5},
        {"text_words": 2, "text_area": 0.05},
        {"clip_similarity": 0.2},
        {"aesthetic": 5.0},
    ],
)
def test_a_pair_on_a_bound_is_kept(make_scores: Make, row: dict[str, object]) -> None:
    scores = make_scores(row)
    exact = scores.set_column(  # float32 of 0.2 is a little above 0.2, of 0.05 too: compare what is stored
        scores.schema.get_field_index("text_area"), "text_area", pa.array([min(0.05, row.get("text_area", 0.0))])
    )
    assert decide(exact, POLICY).reasons.tolist() == [""]


def test_of_copies_the_most_beautiful_then_largest_then_first_key_stays(make_scores: Make) -> None:
    same = {"phash": "00ff00ff00ff00ff", "embedding": [1.0] + [0.0] * 15}
    beautiful = make_scores(same, {**same, "aesthetic": 9.0}, same)
    assert decide(beautiful, POLICY).reasons.tolist() == ["duplicate", "", "duplicate"]
    larger = make_scores(same, same, {**same, "width_px": 110})
    assert decide(larger, POLICY).reasons.tolist() == ["duplicate", "duplicate", ""]
    assert decide(make_scores(same, same), POLICY).reasons.tolist() == ["", "duplicate"]


def test_a_rejected_picture_does_not_displace_its_copy(make_scores: Make) -> None:
    same = {"phash": "00ff00ff00ff00ff", "embedding": [1.0] + [0.0] * 15}
    scores = make_scores({**same, "aesthetic": 9.0, "clip_similarity": 0.0}, same)
    assert decide(scores, POLICY).reasons.tolist() == ["low_clip_similarity", ""]


def test_ranks_follow_beauty_and_quotas_cut_the_worst_ranked(make_scores: Make) -> None:
    beauty = [5.5, 9.0, 7.0, 8.0, 6.0]
    concepts = ["ball", "ball", "ball", "cube", "cube"]
    scores = make_scores(*({"aesthetic": a, "concept": c} for a, c in zip(beauty, concepts, strict=True)))
    assert decide(scores, POLICY).rank.tolist() == [4, 0, 2, 1, 3]
    top = decide(scores, dataclasses.replace(POLICY, max_images=2))
    assert top.reasons.tolist() == ["not_in_top_k", "", "not_in_top_k", "", "not_in_top_k"]
    balanced = decide(scores, dataclasses.replace(POLICY, max_share_per_concept=0.4))
    assert balanced.reasons.tolist() == ["over_quota", "", "", "", ""]


def test_likes_move_the_rank_only_by_their_weight(make_scores: Make) -> None:
    scores = make_scores({"aesthetic": 8.0}, {"aesthetic": 7.9, "likes": 1000})
    assert decide(scores, POLICY).rank.tolist() == [0, 1]
    assert decide(scores, dataclasses.replace(POLICY, likes_weight=0.1)).rank.tolist() == [1, 0]


def test_a_bound_on_a_score_that_nobody_measured_is_an_error(make_scores: Make) -> None:
    scores = make_scores({"offensive": None}, {"offensive": None})
    with pytest.raises(RecipeError, match="bounds 'offensive' at 0.5, but no row"):
        decide(scores, POLICY)
    assert decide(scores, dataclasses.replace(POLICY, max_offensive=None)).reasons.tolist() == ["", ""]


def test_a_table_where_every_pair_is_behind_a_gate_is_judged(make_scores: Make) -> None:
    gated = {"gate_reason": "too_small", **NOTHING_MEASURED}
    decision = decide(make_scores(gated, gated), POLICY)
    assert decision.reasons.tolist() == ["too_small", "too_small"] and np.isnan(decision.rank).all()


def test_the_funnel_adds_up_and_tells_unique_kills(make_scores: Make) -> None:
    scores = make_scores({}, {"width_px": 10, "height_px": 10, "offensive": 0.9}, {"offensive": 0.9}, {"aesthetic": 1})
    decision = decide(scores, POLICY)
    steps = {s.reason: s for s in funnel(decision)}
    assert sum(s.rejected for s in steps.values()) == int((decision.reasons != "").sum()) == 3
    offensive = steps["offensive"]
    assert (offensive.entered, offensive.rejected, offensive.total, offensive.unique) == (3, 1, 2, 1)
    assert (steps["too_small"].total, steps["too_small"].unique) == (1, 0)
    assert [s.reason for s in funnel(decision)] == [r for r in REASONS if r in steps]
