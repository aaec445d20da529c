"""What a report shows of the scores of a pool too large to load: histograms, and keys just inside and outside a bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from emu_ray.curation.policy import OF_ONE_ROW, ScoreBound, SelectionPolicy, score_bounds
from emu_ray.curation.row_batches import ValueRange
from emu_ray.curation.row_rules import RowFacts, bit_of, numbers

BINS = 50
EXAMPLES = 8
USUAL = {  # column -> its range where the Parquet footers don't tell it
    "offensive": (0.0, 1.0),
    "aesthetic": (0.0, 10.0),
    "clip_similarity": (-1.0, 1.0),
    "text_words": (0.0, 50.0),
    "text_area": (0.0, 1.0),
    "watermark": (0.0, 1.0),
    "photography": (0.0, 1.0),
}
_ALL_RULES = sum(int(bit_of(r)) for r in OF_ONE_ROW)


@dataclass
class _Nearest:
    """The EXAMPLES keys nearest to a bound on one side, of all rows shown so far; of equals the smaller keys."""

    distance: np.ndarray
    key: np.ndarray

    def add(self, distance: np.ndarray, key: np.ndarray) -> None:
        if len(self.key) == EXAMPLES:
            near = distance <= self.distance[-1]
            distance, key = distance[near], key[near]
        if len(key) > EXAMPLES:
            near = distance <= np.partition(distance, EXAMPLES - 1)[EXAMPLES - 1]
            distance, key = distance[near], key[near]
        distance, key = np.append(self.distance, distance), np.append(self.key, key)
        order = np.lexsort((key, distance))[:EXAMPLES]
        self.distance, self.key = distance[order], key[order]


class ScoreCharts:
    """Takes the pool batch by batch; holds BINS numbers a score and EXAMPLES keys a side of each bound."""

    def __init__(self, columns: list[str], policy: SelectionPolicy, ranges: dict[str, ValueRange]) -> None:
        self.bounds = score_bounds(policy)
        charted = dict.fromkeys([*USUAL, *(b.column for b in self.bounds)])
        self.edges = {c: _edges(c, ranges.get(c)) for c in charted if c in columns}
        self.counts = {c: np.zeros(BINS, np.int64) for c in self.edges}
        self.missing = dict.fromkeys(self.edges, 0)
        self.one_sided = [
            half
            for bound in self.bounds
            for half in (replace(bound, most=None), replace(bound, least=None))
            if half.least is not None or half.most is not None
        ]
        self.nearest = {
            (bound, where): _Nearest(np.empty(0), np.empty(0, np.int64))
            for bound in self.one_sided
            for where in ("below", "above")
        }

    def add(self, scores: pa.Table, facts: RowFacts) -> None:
        """Count the rows of a batch, and remember those nearest to a bound among the ones that all other rules keep."""
        values = {column: numbers(scores, column) for column in self.edges}
        for column, edges in self.edges.items():
            known = values[column][np.isfinite(values[column])]
            self.missing[column] += len(scores) - len(known)
            self.counts[column] += np.histogram(np.clip(known, edges[0], edges[-1]), BINS, (edges[0], edges[-1]))[0]
        failed = {bound: bound.fails(values[bound.column]) for bound in self.one_sided}
        for bound in self.one_sided:
            own = bit_of(bound.reason)
            others = np.uint32(_ALL_RULES & ~int(own))
            wanted = ((facts.marks & others) == 0) & np.isfinite(values[bound.column])
            wanted &= ((facts.marks & own) != 0) == failed[bound]  # no gate, and no other bound, gives this reason
            for other in self.one_sided:
                if other.reason == bound.reason and other != bound:
                    wanted &= ~failed[other]
            value, key, is_out = values[bound.column][wanted], facts.key[wanted], failed[bound][wanted]
            below = is_out if bound.most is None else ~is_out  # a value on the bound is kept
            limit = bound.least if bound.most is None else bound.most
            self.nearest[bound, "below"].add(limit - value[below], key[below])
            self.nearest[bound, "above"].add(value[~below] - limit, key[~below])

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Column -> `edges` (BINS + 1), `counts` (BINS), `missing` rows, and its bounds `least` and `most`, if any."""
        of_column = {b.column: b for b in self.bounds}
        return {
            column: {
                "edges": [round(float(e), 6) for e in edges],
                "counts": self.counts[column].tolist(),
                "missing": self.missing[column],
                "least": _bound(of_column.get(column), "least"),
                "most": _bound(of_column.get(column), "most"),
            }
            for column, edges in self.edges.items()
        }

    def examples(self) -> list[dict[str, Any]]:
        """Of each bound up to EXAMPLES keys just `below` and just `above` it, the nearest first; `side` is least or most.

        They pass every other rule of one row, and every other bound with the same reason. A key on the bound, which
        the rule keeps, stands with those it keeps.
        """
        return [
            {
                "score": bound.column,
                "side": "least" if bound.most is None else "most",
                "bound": bound.least if bound.most is None else bound.most,
                "below": self.nearest[bound, "below"].key.tolist(),
                "above": self.nearest[bound, "above"].key.tolist(),
            }
            for bound in self.one_sided
        ]


def _edges(column: str, found: ValueRange | None) -> np.ndarray:
    least, most = USUAL.get(column, (0.0, 1.0))
    if found is not None and np.isfinite([found.least, found.most]).all():
        least, most = found.least, found.most
    if least == most:
        least, most = least - 0.5, most + 0.5
    return np.linspace(least, most, BINS + 1)


def _bound(bound: ScoreBound | None, side: str) -> float | None:
    return None if bound is None else getattr(bound, side)
