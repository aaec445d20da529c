"""The policy: one crafted pair a reason, the order of reasons, and the funnel's sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.curation.deciding import decide, embedding_matrix, funnel
from emu_ray.curation.policy import REASONS, SelectionPolicy
from emu_ray.curation.row_rules import RowFacts, hex_words
from emu_ray.curation.selecting import checked_counts
from emu_ray.errors import RecipeError, SchemaError, StationError

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


def with_column(scores: pa.Table, name: str, values: list[float | None]) -> pa.Table:
    if name in scores.column_names:
        scores = scores.drop_columns([name])
    return scores.append_column(name, pa.array(values, pa.float32()))


def test_every_row_has_one_reason_and_the_sum_is_the_pool(make_scores: Make) -> None:
    decision = decide(make_scores({}, {"offensive": 0.9, "text_words": 9}, {"aesthetic": 1.0}), POLICY)
    assert sum(s.rejected for s in funnel(decision)) + int((decision.codes == 0).sum()) == 3
    with pytest.raises(StationError, match="expected a decision on each of 4 pairs, found 3"):
        checked_counts(4, decision.codes, funnel(decision))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"gate_reason": "not_fetched", "decode_error": "empty file", **NOTHING_MEASURED}, "not_fetched"),
        ({"gate_reason": "crashed_decoder", "decode_error": "crashed", **NOTHING_MEASURED}, "crashed_decoder"),
        ({"gate_reason": "scorer_failed", **NOTHING_MEASURED}, "scorer_failed"),
    ],
)
def test_what_kept_a_pair_from_being_measured_is_its_reason(
    make_scores: Make, row: dict[str, object], reason: str
) -> None:
    decision = decide(make_scores({}, row), POLICY)
    assert decision.reasons.tolist() == ["", reason]
    assert not decision.flags["undecodable"].any()


def test_an_unknown_gate_is_an_error_not_a_kept_pair(make_scores: Make) -> None:
    with pytest.raises(SchemaError, match="found 'gate of tomorrow'"):
        decide(make_scores({}, {"gate_reason": "gate of tomorrow", **NOTHING_MEASURED}), POLICY)


@pytest.mark.parametrize(
    ("column", "bound", "values", "reason"),
    [
        ("watermark", {"max_watermark": 0.5}, [0.5, 0.51, None], "watermark"),
        ("photography", {"min_photography": 0.5}, [0.5, 0.49, None], "low_photography"),
        ("photo_exposure", {"photo_bounds": {"exposure": (0.25, None)}}, [0.25, 0.24, None], "low_photography"),
        ("photo_contrast", {"photo_bounds": {"contrast": (0.0, 0.75)}}, [0.75, 0.76, None], "low_photography"),
    ],
)
def test_new_bounds_reject_beyond_them_and_are_off_by_default(
    make_scores: Make, column: str, bound: dict, values: list, reason: str
) -> None:
    scores = with_column(make_scores({}, {}, {}), column, values)
    assert decide(scores, POLICY).reasons.tolist() == ["", "", ""]
    assert decide(scores, dataclasses.replace(POLICY, **bound)).reasons.tolist() == ["", reason, ""]


def test_a_bound_on_a_column_that_is_not_there_is_an_error(make_scores: Make) -> None:
    scores = make_scores({})
    with pytest.raises(RecipeError, match="bounds 'photo_horizon', but the scores have no such column"):
        decide(scores, dataclasses.replace(POLICY, photo_bounds={"horizon": (0.5, None)}))


def test_a_picture_that_fails_its_photography_does_not_displace_its_copy(make_scores: Make) -> None:
    same = {"phash": "00ff00ff00ff00ff", "embedding": [1.0] + [0.0] * 15}
    scores = with_column(make_scores({**same, "aesthetic": 9.0}, same), "photography", [0.1, 0.9])
    policy = dataclasses.replace(POLICY, min_photography=0.5)
    assert decide(scores, policy).reasons.tolist() == ["low_photography", ""]


def test_concept_quotas_cut_the_worst_ranked_and_tell_what_is_missing(make_scores: Make) -> None:
    concepts = ["ball", "ball", "ball", "cube", None]
    scores = make_scores(*({"aesthetic": 6.0 + i, "concept": c} for i, c in enumerate(concepts)))
    policy = dataclasses.replace(POLICY, concept_quotas={"ball": 2, "cube": 3, "cone": 4})
    decision = decide(scores, policy)
    assert decision.reasons.tolist() == ["over_quota", "", "", "", ""]
    assert {c.concept: (c.wanted, c.candidates, c.kept, c.shortfall) for c in decision.concepts} == {
        "ball": (2, 3, 2, 0),
        "cube": (3, 1, 1, 2),
        "cone": (4, 0, 0, 4),
        "": (None, 1, 1, None),
    }
    assert [c.concept for c in decision.concepts] == ["ball", "cube", "cone", ""]  # asked for first, then by candidates
    every_other = dataclasses.replace(POLICY, concept_quotas={"ball": 2, "*": 0})
    assert decide(scores, every_other).reasons.tolist() == ["over_quota", "", "", "over_quota", "over_quota"]


def test_a_share_and_a_quota_both_hold_and_max_images_counts_what_they_leave(make_scores: Make) -> None:
    scores = make_scores(*({"aesthetic": 9.0 - i / 10, "concept": "ball" if i < 4 else "cube"} for i in range(6)))
    policy = dataclasses.replace(POLICY, concept_quotas={"ball": 3}, max_share_per_concept=0.5, max_images=3)
    expected = ["", "over_quota", "over_quota", "over_quota", "", "over_quota"]
    assert decide(scores, policy).reasons.tolist() == expected
    top = dataclasses.replace(POLICY, concept_quotas={"ball": 1}, max_images=2)
    assert decide(scores, top).reasons.tolist() == ["", *["over_quota"] * 3, "", "not_in_top_k"]


def test_a_negative_quota_is_refused() -> None:
    with pytest.raises(RecipeError, match="quota of concept 'ball' must be at least 0"):
        SelectionPolicy(concept_quotas={"ball": -1})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_share_per_concept", 25.0, "from 0 to 1, found 25.0"),
        ("max_aspect", 0.5, "at least 1, found 0.5"),
        ("max_offensive", 50.0, "from 0 to 1, found 50.0"),
        ("max_watermark", -0.1, "from 0 to 1, found -0.1"),
        ("max_text_words", -1, "at least 0, found -1"),
        ("max_text_area", 5.0, "from 0 to 1, found 5.0"),
        ("min_clip_similarity", 28.0, "from -1 to 1, found 28.0"),
        ("min_photography", 40.0, "from 0 to 1, found 40.0"),
        ("min_aesthetic", float("nan"), "from 0 to 10, found nan"),
        ("max_images", 0, "at least 1, found 0"),
    ],
)
def test_a_bound_that_cannot_be_meant_is_refused(field: str, value: float, said: str) -> None:
    with pytest.raises(RecipeError, match=f"{field} of SelectionPolicy must be {said}"):
        dataclasses.replace(POLICY, **{field: value})


@pytest.mark.parametrize("bound", [(0.9, 0.1), (None, -0.5), (30.0, None)])
def test_photographic_bounds_that_cannot_be_meant_are_refused(bound: tuple[float | None, float | None]) -> None:
    with pytest.raises(RecipeError, match="photo_bounds exposure must be least and most within 0 to 1, found"):
        dataclasses.replace(POLICY, photo_bounds={"exposure": bound})


def test_facts_of_pieces_joined_are_the_facts_of_the_whole(make_scores: Make) -> None:
    rows = [{"concept": c, "likes": 7 * i, "width_px": 60 + i} for i, c in enumerate(["b", None, "a", "b", "c"])]
    scores = make_scores(*rows, {"phash": None, "image_digest": None})
    policy = dataclasses.replace(POLICY, likes_weight=0.5)
    whole = RowFacts.of(scores, policy)
    parts = [RowFacts.of(scores.slice(i, 2), policy) for i in (0, 2, 4)]
    joined = RowFacts.joined(parts, 6)
    for name in ("key", "phash", "digest", "marks", "quality", "pixels"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist(), name
    assert [joined.concepts[c] for c in joined.concept] == ["b", "", "a", "b", "c", "ball"]
    assert (joined.measured, joined.present) == (whole.measured, whole.present)
    assert (
        sum(
            getattr(whole, n).dtype.itemsize
            for n in ("key", "phash", "digest", "marks", "quality", "pixels", "concept")
        )
        == 40
    )
    for rows_said in (5, 7):
        with pytest.raises(SchemaError, match=f"expected {rows_said} rows of scores"):
            RowFacts.joined(parts, rows_said)


def test_hashes_are_read_from_hex_whatever_lies_around_them() -> None:
    words = [0, 1, 0x0123456789ABCDEF, 2**64 - 1]
    column = pa.chunked_array(
        [[None, "x", *(f"{w:016x}" for w in words[:2])], [None, *(f"{w:016X}" for w in words[2:])]]
    )
    assert hex_words(column.slice(2)).tolist() == words
    assert hex_words(pa.chunked_array([["no hash", *(f"{w:016x}" for w in words)]]).slice(2)).tolist() == words[1:]
    for wrong in ("0" * 15, "0" * 15 + "g", "0" * 17):
        with pytest.raises(SchemaError, match="16 hex digits"):
            hex_words(pa.chunked_array([["0" * 16, wrong]]))


def test_embeddings_of_one_length_become_a_matrix_with_nan_for_none() -> None:
    column = pa.chunked_array([pa.array([None, [1.0, 2.0]]), pa.array([[3.0, 4.0], None])])
    matrix = embedding_matrix(column)
    assert matrix is not None and np.isnan(matrix[[0, 3]]).all() and matrix[1:3].tolist() == [[1, 2], [3, 4]]
    assert embedding_matrix(pa.array([None, None], pa.list_(pa.float32()))) is None
    with pytest.raises(SchemaError, match="embeddings of one length"):
        embedding_matrix(pa.array([[1.0, 2.0], [1.0]]))
