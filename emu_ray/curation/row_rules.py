"""What is kept in memory of each scored pair while a selection is made, and the rules that look at one pair alone.

40 bytes a row, whatever the scores' width: 0.4 GB for ten million pairs. Embeddings are not among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emu_ray.curation.duplicates import Hashed
from emu_ray.curation.policy import OF_ONE_ROW, REASONS, SelectionPolicy, score_bounds
from emu_ray.errors import RecipeError, SchemaError
from emu_ray.records import SCHEMAS

HAS_HASH, HAS_DIGEST = 1 << 31, 1 << 30  # in `marks`, above the reasons' bits
OPTIONAL = ("has_caption", "image_digest", "likes", "watermark", "photography")
MORE_EXACT = ("not_fetched", "crashed_decoder")  # gates of rows that can't be decoded either


def bit_of(reason: str) -> np.uint32:
    """The bit of a reason in `RowFacts.marks`."""
    return np.uint32(1 << REASONS.index(reason))


@dataclass(frozen=True)
class RowFacts:
    """N scored pairs as columns of numbers, in the order of the station."""

    key: np.ndarray  # int64
    phash: np.ndarray  # uint64, 0 without HAS_HASH
    digest: np.ndarray  # uint64 of the encoded bytes, 0 without HAS_DIGEST
    marks: np.ndarray  # uint32: a bit for each reason that alone would reject the row, HAS_HASH, HAS_DIGEST
    quality: np.ndarray  # float32, -inf when unknown
    pixels: np.ndarray  # uint32, 0 when unknown
    concept: np.ndarray  # int32, an index of `concepts`
    concepts: tuple[str, ...]  # "" where nobody measured it
    measured: int  # rows that no scoring gate stopped
    present: Counter[str]  # bounded column -> rows that have a value

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of(cls, scores: pa.Table, policy: SelectionPolicy, ranked_by: str | None = "aesthetic") -> RowFacts:
        """The facts of a `scores` table. RecipeError for a bound on a column that isn't there, SchemaError for nulls.

        `ranked_by` is the score that makes the quality, one for the whole pool: see `ranking_score`.
        """
        check_columns(scores.column_names, policy)
        for name in ("key", "decode_error", "gate_reason"):
            if scores[name].null_count:
                raise SchemaError(f"expected no nulls in the scores' column {name!r}, found {scores[name].null_count}")
        marks = np.zeros(len(scores), np.uint32)
        for reason, rows in row_flags(scores, policy).items():
            marks[rows] |= bit_of(reason)
        words = {}
        for name, mark in (("phash", HAS_HASH), ("image_digest", HAS_DIGEST)):
            words[name] = np.zeros(len(scores), np.uint64)
            if name in scores.column_names:
                there = scores[name].is_valid().to_numpy()
                words[name][there] = hex_words(scores[name])
                marks[there] |= np.uint32(mark)
        concept, concepts = _codes(scores["concept"])
        pixels = np.nan_to_num(numbers(scores, "width_px") * numbers(scores, "height_px"))
        return cls(
            key=scores["key"].cast(pa.int64()).to_numpy(),
            phash=words["phash"],
            digest=words["image_digest"],
            marks=marks,
            quality=quality(scores, policy, ranked_by),
            pixels=np.clip(pixels, 0, 2**32 - 1).astype(np.uint32),
            concept=concept,
            concepts=concepts,
            measured=int(pc.sum(pc.equal(scores["gate_reason"], "")).as_py() or 0),
            present=Counter({b.column: len(scores) - scores[b.column].null_count for b in score_bounds(policy)}),
        )

    @classmethod
    def joined(cls, parts: Iterable[RowFacts], rows: int) -> RowFacts:
        """All parts one after another, which have `rows` rows together; each part may be freed once it was taken."""
        arrays = {name: np.empty(rows, kind) for name, kind in _KINDS.items()}
        numbers_of: dict[str, int] = {}
        start, measured, present = 0, 0, Counter[str]()
        for part in parts:
            end = start + len(part)
            if end > rows:
                raise SchemaError(f"expected {rows} rows of scores, found more")
            own = np.array([numbers_of.setdefault(c, len(numbers_of)) for c in part.concepts], np.int32)
            for name, array in arrays.items():
                array[start:end] = own[part.concept] if name == "concept" else getattr(part, name)
            start, measured = end, measured + part.measured
            present.update(part.present)
        if start != rows:
            raise SchemaError(f"expected {rows} rows of scores, found {start}")
        return cls(**arrays, concepts=tuple(numbers_of), measured=measured, present=present)

    def order(self) -> np.ndarray:
        """(N,) rows from best to worst: by quality, then pixels, then the smaller key; unknowns last.

        Rows below the aesthetic bound stand behind all others: likes can't lift them above a copy that may be kept.
        """
        fails = (self.marks & bit_of("low_aesthetic")) != 0
        return np.lexsort((self.key, ~self.pixels, -self.quality, fails))

    def hashed(self, order: np.ndarray) -> Hashed:
        """The rows that have a hash, best first."""
        rows = order[(self.marks[order] & np.uint32(HAS_HASH)) != 0].astype(np.uint32)
        has_digest = (self.marks[rows] & np.uint32(HAS_DIGEST)) != 0
        return Hashed(rows, self.phash[rows], self.digest[rows], has_digest)


_KINDS = {
    "key": np.int64,
    "phash": np.uint64,
    "digest": np.uint64,
    "marks": np.uint32,
    "quality": np.float32,
    "pixels": np.uint32,
    "concept": np.int32,
}


def columns_to_read(available: Iterable[str], policy: SelectionPolicy) -> list[str]:
    """The columns of a `scores` station that `RowFacts.of` looks at, as far as they are there."""
    wanted = [n for n in SCHEMAS["scores"].names if n != "embedding"]
    wanted += [n for n in (*OPTIONAL, *(b.column for b in score_bounds(policy))) if n not in wanted]
    return [n for n in wanted if n in set(available)]


def check_columns(available: Iterable[str], policy: SelectionPolicy) -> None:
    """RecipeError for a bound on a score that this station doesn't have."""
    for bound in score_bounds(policy):
        if bound.column not in available:
            raise RecipeError(
                f"the policy bounds {bound.column!r}, but the scores have no such column: "
                "score with what measures it, or set the bound to None"
            )


def check_measured(facts: RowFacts, policy: SelectionPolicy) -> None:
    """RecipeError for a bound on a score that nobody measured: it would keep everything in silence."""
    for bound in score_bounds(policy):
        if facts.measured and not facts.present[bound.column]:
            value = bound.least if bound.least is not None else bound.most
            raise RecipeError(
                f"the policy bounds {bound.column!r} at {value}, but no row of the scores has it: "
                "score with its head, or set the bound to None"
            )


def row_flags(scores: pa.Table, policy: SelectionPolicy) -> dict[str, np.ndarray]:
    """Reason -> (N,) bool for each rule that looks at one row alone; a row flagged by a scoring gate stays flagged."""
    width, height = numbers(scores, "width_px"), numbers(scores, "height_px")
    gate = scores["gate_reason"].cast(pa.string())
    is_other = pc.is_in(gate, value_set=pa.array(MORE_EXACT))
    broken = pc.and_(pc.not_equal(scores["decode_error"].cast(pa.string()), ""), pc.invert(is_other))
    flags = {"undecodable": broken.to_numpy()}
    if policy.needs_caption and "has_caption" in scores.column_names:
        flags["empty_caption"] = ~pc.fill_null(scores["has_caption"], False).to_numpy()
    if policy.min_short_side_px is not None:
        flags["too_small"] = np.minimum(width, height) < policy.min_short_side_px
    if policy.max_aspect is not None:
        flags["extreme_aspect"] = np.maximum(width, height) > policy.max_aspect * np.minimum(width, height)
    for bound in score_bounds(policy):
        failed = bound.fails(numbers(scores, bound.column))
        flags[bound.reason] = flags.get(bound.reason, False) | failed
    for name in pc.unique(gate).to_pylist():
        if name == "":
            continue
        if name not in OF_ONE_ROW:
            raise SchemaError(f"expected gate_reason to be one of {', '.join(OF_ONE_ROW)}, found {name!r}")
        flags[name] = flags.get(name, False) | pc.equal(gate, name).to_numpy()
    return flags


def ranking_score(measured: Container[str]) -> str | None:
    """The score by which a pool is ranked: aesthetic, photography where no pair has that, None where none has either."""
    return next((name for name in ("aesthetic", "photography") if name in measured), None)


def quality(scores: pa.Table, policy: SelectionPolicy, ranked_by: str | None = "aesthetic") -> np.ndarray:
    """(N,) float32: the ranking score, 0 to 10, plus likes_weight * ln(1 + likes); -inf without that score."""
    found = np.zeros(len(scores))
    if ranked_by is not None:
        scale = 10.0 if ranked_by == "photography" else 1.0
        found = np.nan_to_num(scale * numbers(scores, ranked_by), nan=-np.inf)
    if policy.likes_weight and "likes" in scores.column_names:
        found = found + policy.likes_weight * np.log1p(np.nan_to_num(numbers(scores, "likes")))
    return found.astype(np.float32)


def numbers(scores: pa.Table, column: str) -> np.ndarray:
    """(N,) float64, NaN for null: every comparison with it is false."""
    return np.asarray(scores[column].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def hex_words(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 of the values that aren't null, each 16 hex digits; SchemaError otherwise."""
    texts = column.cast(pa.string()).drop_null().combine_chunks()
    if not len(texts):
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    digits = _DIGIT[np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]]
    if (np.diff(offsets) != 16).any() or (digits > 15).any():
        raise SchemaError("expected hashes of 16 hex digits in the scores' columns phash and image_digest")
    pairs = digits.reshape(-1, 16)
    return ((pairs[:, ::2] << 4) | pairs[:, 1::2]).view(">u8").ravel().astype(np.uint64)


_DIGIT = np.full(256, 255, np.uint8)
_DIGIT[np.frombuffer(b"0123456789", np.uint8)] = np.arange(10)
_DIGIT[np.frombuffer(b"abcdef", np.uint8)] = _DIGIT[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = pc.fill_null(column.cast(pa.string()), "").combine_chunks().dictionary_encode()
    return texts.indices.to_numpy().astype(np.int32), tuple(texts.dictionary.to_pylist())
