"""Which pairs are kept, and why the others are not: one pure function of the scores table.

Scores are measured once and bounds are tried often; nothing here opens a file or a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from emu_ray.curation.duplicates import DuplicateBounds, copy_pairs, keepers
from emu_ray.curation.perceptual_hash import as_integers
from emu_ray.errors import RecipeError

KEPT = ""


@dataclass(frozen=True, kw_only=True)
class SelectionPolicy:
    """Bounds of the automatic filter, in the order they are tried; None switches a bound off.

    A pair is kept when every bound holds; its reject reason is the first that fails. The paper gives the order's
    outline and no numbers (arXiv 2309.15807, section 3.2): all bounds are our choice.
    """

    min_short_side_px: int | None = 512
    max_aspect: float | None = 2.0  # long side over short side
    needs_caption: bool = True
    max_offensive: float | None = 0.5  # probability
    max_text_words: int | None = 2
    max_text_area: float | None = 0.05  # share of the picture covered by text, 0 to 1
    min_clip_similarity: float | None = 0.2  # cosine, -1 to 1
    duplicates: DuplicateBounds | None = field(default_factory=DuplicateBounds)
    min_aesthetic: float | None = 5.0  # 0 to 10
    likes_weight: float = 0.0  # added to the aesthetic score for ranking, per natural logarithm of (1 + likes)
    max_share_per_concept: float | None = None  # of max_images, 0 to 1; worse-ranked pairs beyond it are rejected
    max_images: int | None = None  # the best-ranked are kept


REASONS = (
    "undecodable",
    "empty_caption",
    "too_small",
    "extreme_aspect",
    "offensive",
    "overlaid_text",
    "low_clip_similarity",
    "duplicate",
    "low_aesthetic",
    "over_quota",
    "not_in_top_k",
)


@dataclass(frozen=True)
class Decision:
    """What the policy says of N rows."""

    reasons: np.ndarray  # (N,) str, KEPT or one of REASONS: the first bound that failed
    rank: np.ndarray  # (N,) float32, 0 = best, over the rows that only quotas could reject; NaN for the others
    flags: dict[str, np.ndarray]  # reason -> (N,) bool: the rule alone would reject it


def decide(scores: pa.Table, policy: SelectionPolicy) -> Decision:
    """Judge every row of a `scores` table; a score that is null fails no bound.

    RecipeError when a bound is set on a score that no row has. Duplicates are sought among the rows that passed the
    bounds before, so a rejected picture never displaces its copy.
    """
    _check_measured(scores, policy)
    flags = row_flags(scores, policy)
    reasons = np.full(len(scores), KEPT, dtype=object)
    quality = quality_order(scores, policy)

    def reject(name: str, rows: np.ndarray) -> None:
        reasons[rows & (reasons == KEPT)] = name

    for name in REASONS[: REASONS.index("duplicate")]:
        if name in flags:
            reject(name, flags[name])
    if policy.duplicates is not None:
        pairs = pairs_of_copies(scores, policy.duplicates)
        flags["duplicate"] = _surplus(scores, pairs, quality, None)
        reject("duplicate", _surplus(scores, pairs, quality, reasons == KEPT))
    if "low_aesthetic" in flags:
        reject("low_aesthetic", flags["low_aesthetic"])
    rank = np.full(len(scores), np.nan, np.float32)
    candidates = quality[reasons[quality] == KEPT]
    rank[candidates] = np.arange(len(candidates))
    reasons[_over_quota(scores, candidates, policy)] = "over_quota"
    if policy.max_images is not None:
        reasons[candidates[reasons[candidates] == KEPT][policy.max_images :]] = "not_in_top_k"
    return Decision(reasons.astype(str), rank, flags)


def row_flags(scores: pa.Table, policy: SelectionPolicy) -> dict[str, np.ndarray]:
    """Reason -> (N,) bool for each rule that looks at one row alone; a row flagged by a scoring gate stays flagged."""
    width, height = _numbers(scores, "width_px"), _numbers(scores, "height_px")
    gate = np.asarray(scores["gate_reason"].to_pylist(), dtype=object)
    flags = {"undecodable": np.asarray(scores["decode_error"].to_pylist(), dtype=object) != ""}
    if policy.needs_caption and "has_caption" in scores.column_names:
        flags["empty_caption"] = ~np.asarray(scores["has_caption"].to_pylist(), bool)
    if policy.min_short_side_px is not None:
        flags["too_small"] = np.minimum(width, height) < policy.min_short_side_px
    if policy.max_aspect is not None:
        flags["extreme_aspect"] = np.maximum(width, height) > policy.max_aspect * np.minimum(width, height)
    if policy.max_offensive is not None:
        flags["offensive"] = _numbers(scores, "offensive") > policy.max_offensive
    if policy.max_text_words is not None or policy.max_text_area is not None:
        words = np.inf if policy.max_text_words is None else policy.max_text_words
        area = np.inf if policy.max_text_area is None else policy.max_text_area
        flags["overlaid_text"] = (_numbers(scores, "text_words") > words) | (_numbers(scores, "text_area") > area)
    if policy.min_clip_similarity is not None:
        flags["low_clip_similarity"] = _numbers(scores, "clip_similarity") < policy.min_clip_similarity
    if policy.min_aesthetic is not None:
        flags["low_aesthetic"] = _numbers(scores, "aesthetic") < policy.min_aesthetic
    for name in REASONS:
        gated = gate == name
        if gated.any():
            flags[name] = flags.get(name, np.zeros(len(scores), bool)) | gated
    return flags


def quality_order(scores: pa.Table, policy: SelectionPolicy) -> np.ndarray:
    """Rows from best to worst: by aesthetic plus weighted likes, then pixels, then the smaller key; unknowns last."""
    quality = np.nan_to_num(_numbers(scores, "aesthetic"), nan=-np.inf)
    if policy.likes_weight and "likes" in scores.column_names:
        quality = quality + policy.likes_weight * np.log1p(np.nan_to_num(_numbers(scores, "likes")))
    pixels = np.nan_to_num(_numbers(scores, "width_px") * _numbers(scores, "height_px"))
    return np.lexsort((np.asarray(scores["key"].to_pylist(), np.int64), -pixels, -quality))


def pairs_of_copies(scores: pa.Table, bounds: DuplicateBounds) -> np.ndarray:
    """(M, 2) rows of `scores` that are copies of each other; rows without a hash have none."""
    rows = np.flatnonzero([h is not None for h in scores["phash"].to_pylist()])
    if not len(rows):
        return np.empty((0, 2), np.int64)
    some = scores.take(pa.array(rows))
    digests = np.asarray(some["image_digest"].to_pylist()) if "image_digest" in some.column_names else None
    pairs = copy_pairs(as_integers(some["phash"].to_pylist()), _embeddings(some), bounds, digests)
    return rows[pairs]


@dataclass(frozen=True)
class FunnelStep:
    """One rule's part in the funnel, in the order of trying."""

    reason: str
    entered: int  # rows that passed every rule before
    rejected: int  # of these, by this rule
    total: int  # rows of the whole pool that the rule alone rejects
    unique: int  # rows that no other rule alone rejects


def funnel(decision: Decision) -> list[FunnelStep]:
    """The rules in order with their kills; quotas depend on what came before, so their total is what they rejected."""
    counts = dict(zip(*np.unique(decision.reasons, return_counts=True), strict=True))
    by_any = np.sum([flag.astype(int) for flag in decision.flags.values()], axis=0)
    left, steps = len(decision.reasons), []
    for reason in REASONS:
        rejected = int(counts.get(reason, 0))
        alone = decision.flags.get(reason)
        if alone is None and not rejected:
            continue
        total = rejected if alone is None else int(alone.sum())
        unique = rejected if alone is None else int((alone & (by_any == 1)).sum())
        steps.append(FunnelStep(reason, left, rejected, total, unique))
        left -= rejected
    return steps


def _surplus(scores: pa.Table, pairs: np.ndarray, quality: np.ndarray, taking_part: np.ndarray | None) -> np.ndarray:
    return keepers(len(scores), pairs, quality, taking_part) != np.arange(len(scores))


def _over_quota(scores: pa.Table, candidates: np.ndarray, policy: SelectionPolicy) -> np.ndarray:
    """Rows beyond their concept's share, the worst-ranked first; without max_images a share of all candidates."""
    if policy.max_share_per_concept is None:
        return candidates[:0]
    whole = len(candidates) if policy.max_images is None else min(policy.max_images, len(candidates))
    quota = max(1, int(policy.max_share_per_concept * whole))
    concepts = np.asarray([c or "" for c in scores["concept"].to_pylist()], dtype=object)[candidates]
    over = [np.flatnonzero(concepts == name)[quota:] for name in sorted(set(concepts))]
    return candidates[np.concatenate(over)] if over else candidates[:0]


def _check_measured(scores: pa.Table, policy: SelectionPolicy) -> None:
    """A bound on a score that nobody measured would keep everything in silence."""
    measured = np.asarray([g == "" for g in scores["gate_reason"].to_pylist()], bool)
    bounds = {
        "offensive": policy.max_offensive,
        "aesthetic": policy.min_aesthetic,
        "clip_similarity": policy.min_clip_similarity,
        "text_words": policy.max_text_words,
        "text_area": policy.max_text_area,
    }
    for name, bound in bounds.items():
        if bound is not None and measured.any() and scores[name].null_count == len(scores):
            raise RecipeError(
                f"the policy bounds {name!r} at {bound}, but no row of the scores has it: "
                "score with its head, or set the bound to None"
            )


def _numbers(scores: pa.Table, column: str) -> np.ndarray:
    """(N,) float64, NaN for null: every comparison with it is false."""
    return np.asarray(scores[column].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _embeddings(scores: pa.Table) -> np.ndarray | None:
    rows = scores["embedding"].to_pylist()
    width = next((len(r) for r in rows if r is not None), None)
    if width is None:
        return None
    nothing = np.full(width, np.nan, np.float32)
    return np.stack([nothing if r is None else np.asarray(r, np.float32) for r in rows])
