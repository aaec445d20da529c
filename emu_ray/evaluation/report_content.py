"""What the report shows: plain frozen records, filled by `jobs.evaluate`, free of any layout.

Images are PNG, JPEG or WebP bytes. Lists that are empty leave their section out of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emu_ray.evaluation.preference import Preference

Winner = Literal["tuned", "base", "tie"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One encoded image with its caption."""

    image: bytes
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class FunnelStep:
    """One rule of the automatic filter, in the order the policy tries them."""

    reason: str  # as in the selection's reject_reason; "" for the pairs kept
    count: int
    meaning: str  # one plain sentence
    unique_kills: int | None = None  # pairs that no other rule would have rejected
    examples: Sequence[Picture] = ()


@dataclass(frozen=True, kw_only=True)
class DefectScore:
    """How well one rule finds the defect that was planted; shares 0 to 1, None when nothing was found or planted."""

    defect: str
    planted: int
    flagged: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class ChosenSet:
    """Who picked the images that the model is tuned on."""

    annotator: Literal["people", "simulated", "nobody"]
    n_candidates: int
    n_chosen: int
    error_rate: float | None = None  # of the simulated annotator, 0 to 1
    examples: Sequence[Picture] = ()

    def sentence(self) -> str:
        """Who chose, in plain words."""
        counts = f"{self.n_chosen:,} of {self.n_candidates:,} candidates"
        if self.annotator == "people":
            return f"People chose {counts}; their choice was read from a list of keys and captions."
        if self.annotator == "nobody":
            return f"Nobody chose: the best-ranked {counts} were taken with their own captions."
        wrong = "" if self.error_rate is None else f" that judges wrongly in {100 * self.error_rate:g} % of cases"
        return (
            f"No person looked at these images. A simulated annotator{wrong} chose {counts}; "
            "it knows how each image was made and stands in for the people of the paper."
        )


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """One prompt and seed, drawn by both models."""

    prompt: str
    seed: int
    base: bytes
    tuned: bytes
    appeal: Winner
    faithfulness: Winner


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Before/after rows and the sentence that says how they were picked."""

    title: str
    how_picked: str
    rows: Sequence[BeforeAfter]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a training chart."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class CurveChart:
    """One small chart; `mark_step` draws the step whose weights were kept."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    note: str = ""  # for tuning: why it stopped
    mark_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything on the page. `facts` and `versions` are (name, value) pairs, `commands` shell lines."""

    title: str
    summary: str = ""
    facts: Sequence[tuple[str, str]] = ()
    funnel: Sequence[FunnelStep] = ()
    filters: Sequence[DefectScore] = ()
    chosen: ChosenSet | None = None
    appeal: Preference | None = None
    faithfulness: Preference | None = None
    judges: str = ""  # who or what decided appeal and faithfulness, in plain words
    grids: Sequence[Grid] = ()
    training: Sequence[CurveChart] = ()
    seconds: Sequence[tuple[str, float]] = ()
    versions: Sequence[tuple[str, str]] = ()
    commands: Sequence[str] = ()
    made_at: str = ""
