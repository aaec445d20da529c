"""Which pairs are kept, and why the others are not: pure functions of a scores table, or of the facts of a whole pool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emu_ray.curation.copies import RunAll, one_after_another
from emu_ray.curation.duplicates import Copies, EmbeddingsOf, embeddings_in_memory, find_copies
from emu_ray.curation.policy import EVERY_OTHER, KEPT, OF_ONE_ROW, REASONS, SelectionPolicy, score_bounds
from emu_ray.curation.row_rules import RowFacts, bit_of, check_measured, ranking_score
from emu_ray.errors import SchemaError

NAMES = np.array([KEPT, *REASONS])
_RULES = np.uint32((1 << len(REASONS)) - 1)


@dataclass(frozen=True)
class ConceptCount:
    """One concept's part in a selection."""

    concept: str
    candidates: int  # pairs that every rule before the quotas keeps
    kept: int
    wanted: int | None = None  # its quota, if it has one
    shortfall: int | None = None  # wanted and not kept


@dataclass(frozen=True)
class Decision:
    """What the policy says of N rows."""

    codes: np.ndarray  # (N,) uint8: 0 = kept, else 1 + the place in REASONS of the first bound that failed
    rank: np.ndarray  # (N,) float64, 0 = best, over the rows that only quotas could reject; NaN for the others
    marks: np.ndarray  # (N,) uint32: a bit for each rule that alone would reject the row; see `flags`
    rules: tuple[str, ...]  # the rules of `marks` that the policy has, or that a scoring gate applied
    keeper: np.ndarray | None  # (N,) uint32: the row kept instead of each duplicate; None without that rule
    concepts: list[ConceptCount]  # most candidates first, where quotas were asked for those first

    @property
    def reasons(self) -> np.ndarray:
        """(N,) str: KEPT or one of REASONS, the first bound that failed. 80 bytes a row: for small tables."""
        return NAMES[self.codes]

    @property
    def flags(self) -> dict[str, np.ndarray]:
        """Reason -> (N,) bool: the rule alone would reject it."""
        return {reason: (self.marks & bit_of(reason)) != 0 for reason in self.rules}


def decide(scores: pa.Table, policy: SelectionPolicy) -> Decision:
    """Judge every row of a `scores` table that lies in memory; a score that is null fails no bound.

    RecipeError when a bound is set on a score that no row has. Duplicates are sought among the rows that passed the
    bounds before, so a rejected picture never displaces its copy.
    """
    measured = [n for n in scores.column_names if scores[n].null_count < len(scores)]
    facts = RowFacts.of(scores, policy, ranking_score(measured))
    return decide_facts(facts, policy, embeddings_in_memory(embedding_matrix(scores["embedding"])))[0]


def decide_facts(
    facts: RowFacts, policy: SelectionPolicy, embeddings_of: EmbeddingsOf, run_all: RunAll = one_after_another
) -> tuple[Decision, dict[str, int]]:
    """Judge a whole pool by its facts, and say what the search for copies did; see `decide`."""
    check_measured(facts, policy)
    order = facts.order()
    copies, report = None, {}
    if policy.duplicates is not None:
        copies = find_copies(len(facts), facts.hashed(order), policy.duplicates, embeddings_of, run_all)
        report = copies.report
    return _decision(facts, policy, order, copies), report


def _decision(facts: RowFacts, policy: SelectionPolicy, order: np.ndarray, copies: Copies | None) -> Decision:
    marks = facts.marks & _RULES
    codes = np.zeros(len(facts), np.uint8)

    def reject(reason: str, rows: np.ndarray) -> None:
        codes[rows & (codes == 0)] = 1 + REASONS.index(reason)

    for reason in REASONS[: REASONS.index("duplicate")]:
        reject(reason, (marks & bit_of(reason)) != 0)
    keeper = None
    if copies is not None:
        own = np.arange(len(facts), dtype=np.uint32)
        marks[copies.keeper() != own] |= bit_of("duplicate")
        keeper = copies.keeper(codes == 0)
        reject("duplicate", keeper != own)
    reject("low_aesthetic", (marks & bit_of("low_aesthetic")) != 0)
    candidates = order[codes[order] == 0]
    rank = np.full(len(facts), np.nan, np.float64)
    rank[candidates] = np.arange(len(candidates))
    limits = _limits(facts, policy, len(candidates))
    if limits is not None:
        codes[candidates[_place_in_group(facts.concept[candidates]) >= limits[facts.concept[candidates]]]] = (
            1 + REASONS.index("over_quota")
        )
    if policy.max_images is not None:
        codes[candidates[codes[candidates] == 0][policy.max_images :]] = 1 + REASONS.index("not_in_top_k")
    concepts = _concepts(facts, policy, candidates, codes)
    return Decision(codes, rank, marks, _rules(policy, marks), keeper, concepts)


def _limits(facts: RowFacts, policy: SelectionPolicy, candidates: int) -> np.ndarray | None:
    """(concepts,) most images of each; None without quotas. Without max_images a share is one of all candidates."""
    if policy.max_share_per_concept is None and policy.concept_quotas is None:
        return None
    share = candidates
    if policy.max_share_per_concept is not None:
        whole = candidates if policy.max_images is None else min(policy.max_images, candidates)
        share = max(1, int(round(policy.max_share_per_concept * whole, 6)))
    quotas = policy.concept_quotas or {}
    every_other = quotas.get(EVERY_OTHER, share)
    return np.array([min(share, quotas.get(name, every_other)) for name in facts.concepts], np.int64)


def _place_in_group(group: np.ndarray) -> np.ndarray:
    """(N,) how many rows of the same group stand before each row."""
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place


def _concepts(
    facts: RowFacts, policy: SelectionPolicy, candidates: np.ndarray, codes: np.ndarray
) -> list[ConceptCount]:
    """Each concept of the pool, and each that has a quota though nobody saw it."""
    size = len(facts.concepts)
    there = np.bincount(facts.concept[candidates], minlength=size).tolist()
    kept = np.bincount(facts.concept[candidates[codes[candidates] == 0]], minlength=size).tolist()
    counts = dict(zip(facts.concepts, zip(there, kept, strict=True), strict=True))
    quotas = policy.concept_quotas or {}
    found = []
    for name in {**counts, **{q: None for q in quotas if q != EVERY_OTHER}}:
        mine, taken = counts.get(name, (0, 0))
        wanted = quotas.get(name, quotas.get(EVERY_OTHER))
        found.append(ConceptCount(name, mine, taken, wanted, None if wanted is None else max(0, wanted - taken)))
    return sorted(found, key=lambda c: (c.wanted is None, -c.candidates, c.concept))


def _rules(policy: SelectionPolicy, marks: np.ndarray) -> tuple[str, ...]:
    """The reasons that stand in the funnel: what the policy asks for, and what a gate of scoring stopped."""
    seen = int(np.bitwise_or.reduce(marks)) if len(marks) else 0
    asked = {"undecodable", *(b.reason for b in score_bounds(policy))}
    asked |= {"empty_caption"} if policy.needs_caption else set()
    asked |= {"too_small"} if policy.min_short_side_px is not None else set()
    asked |= {"extreme_aspect"} if policy.max_aspect is not None else set()
    asked |= {"duplicate"} if policy.duplicates is not None else set()
    return tuple(r for r in REASONS if r in asked or (r in OF_ONE_ROW and seen & int(bit_of(r))))


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
    counts = np.bincount(decision.codes, minlength=1 + len(REASONS)).tolist()
    left, steps = len(decision.codes), []
    for place, reason in enumerate(REASONS):
        rejected = counts[1 + place]
        if reason not in decision.rules and not rejected:
            continue
        total = unique = rejected
        if reason in decision.rules:
            total = int(np.count_nonzero(decision.marks & bit_of(reason)))
            unique = int(np.count_nonzero(decision.marks == bit_of(reason)))
        steps.append(FunnelStep(reason, left, rejected, total, unique))
        left -= rejected
    return steps


def embedding_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray | None:
    """(N, D) float32 of a list column, NaN for null; None when every row is null. SchemaError for lists of two lengths."""
    there = column.is_valid().to_numpy(zero_copy_only=False)
    if not there.any():
        return None
    values = column.drop_null()
    chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
    flat = np.concatenate([c.flatten().to_numpy(zero_copy_only=False).astype(np.float32) for c in chunks])
    width, rest = divmod(len(flat), len(values))
    lengths = {len(c[0]) for c in chunks if len(c)}
    if rest or lengths != {width}:
        raise SchemaError(f"expected embeddings of one length, found lengths {sorted(lengths)}")
    matrix = np.full((len(column), width), np.nan, np.float32)
    matrix[there] = flat.reshape(-1, width)
    return matrix
