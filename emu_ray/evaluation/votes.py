"""Votes of blind comparisons, as the studio writes them, and who is preferred by them."""

from __future__ import annotations

import json
from typing import Any

from emu_ray.errors import InputError
from emu_ray.evaluation.preference import Preference, from_outcomes
from emu_ray.stations import Station

OUTCOME = {"left": 1, "tie": 0, "right": -1}
SIDES = ("left", "right")


def read_votes(folder: str) -> list[dict[str, Any]]:
    """All votes below a folder, oldest first; InputError for none, or a file that is no vote."""
    station = Station(folder)
    names = sorted(name for name in station.store.sizes() if name.endswith(".json"))
    found = [_vote(station.get_bytes(name), station.path(name)) for name in names]
    if not found:
        raise InputError(f"{station.uri}: expected votes, found none: compare pictures on the studio's page first")
    return sorted(found, key=lambda vote: float(vote["time"]))


def preferences(votes: list[dict[str, Any]], *, seed: int = 0) -> dict[tuple[str, str], Preference]:
    """Of each pair of models that was compared, in the order of their names: how often the first is preferred to the second.

    A checkpoint that was replaced under its name is another model: where votes are of several, a name carries the checkpoint's fingerprint.
    """
    known: dict[str, set[str | None]] = {}
    for vote in votes:
        for side in SIDES:
            known.setdefault(vote[f"{side}_model"], set()).add(vote.get(f"{side}_fingerprint"))
    outcomes: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for vote in votes:
        left, right = (_named(vote, side, known) for side in SIDES)
        sign = 1 if left < right else -1
        outcomes.setdefault((min(left, right), max(left, right)), []).append(
            (sign * OUTCOME[vote["choice"]], vote["prompt"])
        )
    return {
        pair: from_outcomes([outcome for outcome, _ in found], [prompt for _, prompt in found], seed=seed)
        for pair, found in sorted(outcomes.items())
    }


def _named(vote: dict[str, Any], side: str, known: dict[str, set[str | None]]) -> str:
    name = str(vote[f"{side}_model"])
    return name if len(known[name]) == 1 else f"{name} ({vote.get(f'{side}_fingerprint') or 'unknown'})"


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
