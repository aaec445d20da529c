"""Who is preferred by people's votes, and which votes are of the same models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emu_ray.errors import InputError
from emu_ray.evaluation.votes import preferences, read_votes
from emu_ray.stations import Station


def vote(left: str, right: str, choice: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "left_model": left,
        "right_model": right,
        "choice": choice,
        "prompt": f"ball {number}",
        "time": 1.0 + number,
        **fields,
    }


def test_sides_are_turned_to_the_order_of_the_names() -> None:
    votes = [vote("tuned", "base", "left", 0), vote("base", "tuned", "right", 1), vote("base", "tuned", "tie", 2)]
    ((pair, found),) = preferences(votes).items()
    assert pair == ("base", "tuned")
    assert (found.win, round(found.tie, 1), round(found.lose, 1)) == (0.0, 33.3, 66.7)


def test_a_checkpoint_that_was_replaced_is_another_model() -> None:
    votes = [
        vote("tuned", "base", "left", 0, left_fingerprint="old", right_fingerprint="b"),
        vote("base", "tuned", "left", 1, left_fingerprint="b", right_fingerprint="new"),
        vote("tuned", "base", "left", 2, left_fingerprint=None, right_fingerprint="b"),
    ]
    found = preferences(votes)
    assert list(found) == [("base", "tuned (new)"), ("base", "tuned (old)"), ("base", "tuned (unknown)")]
    assert [one.n_pairs for one in found.values()] == [1, 1, 1]
    assert found["base", "tuned (new)"].win == 100.0 and found["base", "tuned (old)"].win == 0.0


@pytest.mark.parametrize("content", ["{", "[]", json.dumps(vote("a", "a", "left")), json.dumps(vote("a", "b", "both"))])
def test_what_is_no_vote_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="expected votes, found none"):
        read_votes(str(tmp_path))
    Station(tmp_path).put_file("x.json", content.encode())
    with pytest.raises(InputError, match=r"x\.json: expected a vote"):
        read_votes(str(tmp_path))
