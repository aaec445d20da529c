"""Precision and recall by their definitions, on crafted truths."""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa

from emu_ray.curation.audit import audit
from emu_ray.curation.deciding import decide
from emu_ray.curation.policy import SelectionPolicy

Make = Callable[..., pa.Table]
POLICY = SelectionPolicy(min_short_side_px=64)
SAME = {"phash": "00ff00ff00ff00ff", "embedding": [1.0] + [0.0] * 15}


def truth(defect: str = "", picture: str = "", copy_of: str = "") -> str:
    return json.dumps({"defect": defect, "picture": picture, "copy_of": copy_of, "photogenic": False})


def test_precision_counts_flags_and_recall_counts_measured_rows(make_scores: Make) -> None:
    gate = {"gate_reason": "too_small", "offensive": None, "width_px": 10, "phash": None}
    scores = make_scores({"offensive": 0.9}, {"offensive": 0.9}, {"offensive": 0.1}, gate, {})
    truths = [truth("offensive", "a"), truth("", "b"), truth("offensive", "c"), truth("offensive", "d"), truth("", "e")]
    found = audit(truths, scores, decide(scores, POLICY))["offensive"]
    assert (found.planted, found.measured, found.flagged, found.right) == (3, 2, 2, 1)
    assert found.precision == found.recall == 0.5


def test_the_row_of_a_pair_of_copies_that_is_flagged_may_be_the_original(make_scores: Make) -> None:
    scores = make_scores({**SAME, "aesthetic": 7.0}, SAME, {})
    truths = [truth("", "a"), truth("near_duplicate", "x", "a"), truth("", "b")]
    decision = decide(scores, POLICY)
    assert decision.reasons.tolist() == ["duplicate", "", ""]
    found = audit(truths, scores, decision)["duplicate"]
    assert (found.planted, found.measured, found.flagged, found.right) == (1, 1, 1, 1)


def test_pictures_that_only_look_alike_cost_precision(make_scores: Make) -> None:
    scores = make_scores(SAME, SAME, SAME)
    truths = [truth("", "a"), truth("exact_duplicate", "x", "a"), truth("", "b")]
    found = audit(truths, scores, decide(scores, POLICY))["duplicate"]
    assert (found.planted, found.flagged, found.right) == (1, 2, 1)


def test_a_filter_with_nothing_to_find_has_no_shares(make_scores: Make) -> None:
    scores = make_scores({})
    found = audit([truth("", "a")], scores, decide(scores, POLICY))["overlaid_text"]
    assert found.precision is None and found.recall is None
    assert found.to_plain() == {
        "planted": 0, "measured": 0, "flagged": 0, "right": 0, "precision": None, "recall": None,
    }  # fmt: skip
