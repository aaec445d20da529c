"""What is asked of a pair to be kept: the bounds, their order, and the names of the reasons.

Scores are measured once and bounds are tried often; nothing here opens a file or a model. `deciding.py` applies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from emu_ray.curation.duplicates import DuplicateBounds
from emu_ray.errors import RecipeError

KEPT = ""
PHOTO_PREFIX = "photo_"  # of the columns behind `photo_bounds`
EVERY_OTHER = "*"  # in `concept_quotas`: each concept that isn't named
RANGES = {  # field -> least and most that can be meant
    "max_aspect": (1.0, math.inf),
    "max_offensive": (0.0, 1.0),
    "max_watermark": (0.0, 1.0),
    "max_text_words": (0.0, math.inf),
    "max_text_area": (0.0, 1.0),
    "min_clip_similarity": (-1.0, 1.0),
    "min_photography": (0.0, 1.0),
    "min_aesthetic": (0.0, 10.0),
    "max_share_per_concept": (0.0, 1.0),
    "max_images": (1.0, math.inf),
}

REASONS = (
    "not_fetched",
    "undecodable",
    "crashed_decoder",
    "scorer_failed",
    "empty_caption",
    "too_small",
    "extreme_aspect",
    "offensive",
    "watermark",
    "overlaid_text",
    "low_clip_similarity",
    "low_photography",
    "duplicate",
    "low_aesthetic",
    "over_quota",
    "not_in_top_k",
)
OF_ONE_ROW = tuple(r for r in REASONS if r not in ("duplicate", "over_quota", "not_in_top_k"))


@dataclass(frozen=True, kw_only=True)
class SelectionPolicy:
    """Bounds of the automatic filter, in the order they are tried; None switches a bound off.

    A pair is kept when every bound holds; its reject reason is the first that fails. The paper gives the order's
    outline and no numbers (arXiv 2309.15807, section 3.2): all bounds are our choice. Pairs are ranked by
    quality = aesthetic score + likes_weight * ln(1 + likes), the popularity signal; then by pixels, then by key. Where
    no pair has an aesthetic score, ten times the photography score stands for it.
    """

    min_short_side_px: int | None = 512
    max_aspect: float | None = 2.0  # long side over short side
    needs_caption: bool = True
    max_offensive: float | None = 0.5  # probability
    max_watermark: float | None = None  # probability
    max_text_words: int | None = 2
    max_text_area: float | None = 0.05  # share of the picture covered by text, 0 to 1
    min_clip_similarity: float | None = 0.2  # cosine, -1 to 1
    min_photography: float | None = None  # 0 to 1, the whole of the photographic measures
    photo_bounds: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    # least and most of single photographic measures: exposure 0.3 None asks that photo_exposure is at least 0.3
    duplicates: DuplicateBounds | None = field(default_factory=DuplicateBounds)
    min_aesthetic: float | None = 5.0  # 0 to 10
    likes_weight: float = 0.0  # added to the aesthetic score for ranking, per natural logarithm of (1 + likes)
    max_share_per_concept: float | None = None  # of max_images, 0 to 1; worse-ranked pairs beyond it are rejected
    concept_quotas: dict[str, int] | None = None  # concept -> at most so many images; "*" is each concept not named
    max_images: int | None = None  # the best-ranked are kept

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                asked = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
                raise RecipeError(f"{name} of SelectionPolicy must be {asked}, found {value}")
        for name, (low, high) in self.photo_bounds.items():
            low, high = 0.0 if low is None else low, 1.0 if high is None else high
            if not 0 <= low <= high <= 1:
                raise RecipeError(f"photo_bounds {name} must be least and most within 0 to 1, found {low} {high}")
        for concept, quota in (self.concept_quotas or {}).items():
            if quota < 0:
                raise RecipeError(f"the quota of concept {concept!r} must be at least 0, found {quota}")


@dataclass(frozen=True)
class ScoreBound:
    """One column with its bounds and the reason that a value outside gets."""

    column: str
    reason: str
    least: float | None = None
    most: float | None = None

    def fails(self, values: np.ndarray) -> np.ndarray:
        """(N,) bool; a NaN fails nothing."""
        failed = np.zeros(len(values), bool)
        if self.least is not None:
            failed |= values < self.least
        if self.most is not None:
            failed |= values > self.most
        return failed


def score_bounds(policy: SelectionPolicy) -> list[ScoreBound]:
    """The bounds on measured scores that are switched on."""
    every = [
        ScoreBound("offensive", "offensive", most=policy.max_offensive),
        ScoreBound("watermark", "watermark", most=policy.max_watermark),
        ScoreBound("text_words", "overlaid_text", most=policy.max_text_words),
        ScoreBound("text_area", "overlaid_text", most=policy.max_text_area),
        ScoreBound("clip_similarity", "low_clip_similarity", least=policy.min_clip_similarity),
        ScoreBound("photography", "low_photography", least=policy.min_photography),
        *(
            ScoreBound(f"{PHOTO_PREFIX}{name}", "low_photography", least, most)
            for name, (least, most) in sorted(policy.photo_bounds.items())
        ),
        ScoreBound("aesthetic", "low_aesthetic", least=policy.min_aesthetic),
    ]
    return [b for b in every if b.least is not None or b.most is not None]
