"""Votes of blind comparisons, as the studio writes them, and who is preferred by them."""

from __future__ import annotations

import json
from typing import Any

from emu_ray.errors import InputError
from emu_ray.evaluation.preference import Preference, from_outcomes
from emu_ray.stations import Station

OUTCOME = {"left": 1, "tie": 0, "right": -1}


def read_votes(folder: str) -> list[dict[str, Any]]:
    """All votes below a folder, oldest first; InputError for none, or a file that is no vote."""
    station = Station(folder)
    names = sorted(name for name in station.store.sizes() if name.endswith(".json"))
    found = [_vote(station.get_bytes(name), station.path(name)) for name in names]
    if not found:
        raise InputError(f"{station.uri}: expected votes, found none: compare pictures on the studio's page first")
    return sorted(found, key=lambda vote: float(vote["time"]))


def preferences(votes: list[dict[str, Any]], *, seed: int = 0) -> dict[tuple[str, str], Preference]:
    """Of each pair of models that was compared, in the order of their names: how often the first is preferred to the second."""
    outcomes: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for vote in votes:
        pair = (vote["left_model"], vote["right_model"])
        sign = 1 if pair[0] < pair[1] else -1
        outcomes.setdefault((min(pair), max(pair)), []).append((sign * OUTCOME[vote["choice"]], vote["prompt"]))
    return {
        pair: from_outcomes([outcome for outcome, _ in found], [prompt for _, prompt in found], seed=seed)
        for pair, found in sorted(outcomes.items())
    }


def _vote(content: bytes, where: str) -> dict[str, Any]:
    try:
        vote: dict[str, Any] = json.loads(content)
        is_vote = (
            vote["choice"] in OUTCOME and vote["left_model"] != vote["right_model"] and vote["time"] and vote["prompt"]
        )
    except (ValueError, TypeError, KeyError):
        is_vote = False
    if not is_vote:
        raise InputError(f"{where}: expected a vote as the studio writes it, found another file: remove it")
    return vote
