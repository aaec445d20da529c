"""Precision and recall of the filters where the defects are known: pools that carry a `truth` column.

Definitions. A rule *flags* a row when the rule alone would reject it, among the rows where its score was measured.
Precision is the share of flagged rows that carry the rule's defect; recall is the share of rows with the defect, among
those that reached the measurement, that are flagged. For copies the unit is the surplus: in a planted group of n
pictures any n - 1 may be flagged and count as right, and n - 1 should be.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emu_ray.curation.deciding import Decision

RULE_OF_DEFECT = {
    "undecodable": "undecodable",
    "too_small": "too_small",
    "extreme_aspect": "extreme_aspect",
    "offensive": "offensive",
    "overlaid_text": "overlaid_text",
    "mismatched_caption": "low_clip_similarity",
}
MEASURED_BY = {  # rule -> the column that is null where it was not measured
    "offensive": "offensive",
    "overlaid_text": "text_area",
    "low_clip_similarity": "clip_similarity",
    "duplicate": "phash",
}
COPIES = ("exact_duplicate", "near_duplicate")


@dataclass(frozen=True)
class FilterAudit:
    """One filter against the truth; a share of nothing is None."""

    planted: int  # rows (for duplicates: surplus copies) with the defect in the pool
    measured: int  # of these, how many reached the filter
    flagged: int
    right: int

    @property
    def precision(self) -> float | None:
        """Of the flagged rows, the share that carries the defect, 0 to 1."""
        return self.right / self.flagged if self.flagged else None

    @property
    def recall(self) -> float | None:
        """Of the measured rows with the defect, the share that is flagged, 0 to 1."""
        return self.right / self.measured if self.measured else None

    def to_plain(self) -> dict[str, float | int | None]:
        """As it stands in a report's JSON."""
        return {**vars(self), "precision": self.precision, "recall": self.recall}


def audit(truth: list[str], scores: pa.Table, decision: Decision) -> dict[str, FilterAudit]:
    """Defect -> its filter's audit, for rules that the policy has; `truth` is the JSON of each row of `scores`."""
    facts = [json.loads(text) for text in truth]
    defects = np.asarray([fact["defect"] for fact in facts], dtype=object)
    found: dict[str, FilterAudit] = {}
    for defect, rule in RULE_OF_DEFECT.items():
        if rule in decision.flags:
            measured = _measured(scores, rule)
            planted, flagged = defects == defect, decision.flags[rule] & measured
            found[defect] = FilterAudit(
                int(planted.sum()), int((planted & measured).sum()), int(flagged.sum()), int((planted & flagged).sum())
            )
    if "duplicate" in decision.flags:
        found["duplicate"] = _copies(facts, _measured(scores, "duplicate"), decision.flags["duplicate"])
    return found


def _copies(facts: list[dict], measured: np.ndarray, flags: np.ndarray) -> FilterAudit:
    """Groups are a picture and the rows that say `copy_of` it."""
    group = [fact["copy_of"] if fact["defect"] in COPIES else fact["picture"] for fact in facts]
    planted = Counter(g for g, fact in zip(group, facts, strict=True) if fact["defect"] in COPIES)
    there = Counter(group)
    reached: Counter[str] = Counter()
    flagged: Counter[str] = Counter()
    for g, is_measured, is_flagged in zip(group, measured, flags & measured, strict=True):
        reached[g] += int(is_measured)
        flagged[g] += int(is_flagged)
    return FilterAudit(
        planted=sum(min(copies, there[g] - 1) for g, copies in planted.items()),
        measured=sum(max(0, reached[g] - 1) for g in planted),
        flagged=sum(flagged.values()),
        right=sum(min(flagged[g], max(0, reached[g] - 1)) for g in planted),
    )


def _measured(scores: pa.Table, rule: str) -> np.ndarray:
    column = MEASURED_BY.get(rule)
    if column is None:
        return np.ones(len(scores), bool)
    return np.asarray(scores[column].is_valid().to_pylist(), bool)
