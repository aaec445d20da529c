"""Finds copies of the same picture in a whole pool and says which one stays. Pure: hashes and embeddings in, rows out.

Candidates come from the perceptual hash (`copies.py`), exactly and for the whole pool at once; many pictures share a
layout, so a pair must also look alike to CLIP. Rows of equal bytes are one picture from the start: they are searched
once and need no proof. Of each connected group the best row stays: highest quality, then most pixels, then smallest
key. "Copy of a copy" counts: two pictures of a group may differ by more than the bounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from emu_ray.config import require_at_least
from emu_ray.curation.copies import Found, RunAll, distinct_pairs, one_after_another, pairs_of_piece, pieces_of_work
from emu_ray.curation.perceptual_hash import BITS
from emu_ray.errors import RecipeError

COSINE_BYTES = 32 << 20  # of embeddings multiplied at once

EmbeddingsOf = Callable[[np.ndarray], "np.ndarray | None"]
# sorted distinct rows -> (R, D) float32, NaN where a row has none; None when no row at all has one


@dataclass(frozen=True, kw_only=True)
class DuplicateBounds:
    """Two pictures are copies when their bytes are equal, or when both bounds hold."""

    max_hash_bits: int = 6  # differing bits of the 64-bit perceptual hash
    min_cosine: float = 0.95  # of the CLIP embeddings; pairs without embeddings need the hash alone

    def __post_init__(self) -> None:
        require_at_least(self, 0, "max_hash_bits")
        if self.max_hash_bits >= BITS:
            raise RecipeError(f"max_hash_bits of DuplicateBounds must be below {BITS}, found {self.max_hash_bits}")


@dataclass(frozen=True)
class Hashed:
    """The rows that have a perceptual hash, best first; R of them."""

    rows: np.ndarray  # (R,) row numbers in the pool
    phash: np.ndarray  # (R,) uint64
    digest: np.ndarray | None = None  # (R,) uint64 of the encoded bytes
    has_digest: np.ndarray | None = None  # (R,) bool; None: all


@dataclass(frozen=True)
class Copies:
    """Who is a copy of whom among `count` rows, before anybody is rejected."""

    count: int
    rows: np.ndarray  # (R,) row numbers, best first
    picture: np.ndarray  # (R,) uint32: rows of equal bytes have the same picture; numbered best first
    pairs: np.ndarray  # (M, 2) uint32 pictures that are copies of each other
    report: dict[str, int]  # what the search did, for the manifest

    def keeper(self, taking_part: np.ndarray | None = None) -> np.ndarray:
        """(count,) uint32: the row kept for each row. Rows not `taking_part` (a mask) keep themselves and bind nobody."""
        rows, picture, pairs = self.rows, self.picture, self.pairs
        if taking_part is not None:
            part = taking_part[rows]
            rows, picture = rows[part], picture[part]
            is_there = np.zeros(len(self.picture), bool)
            is_there[picture] = True
            pairs = pairs[is_there[pairs].all(axis=1)]
        group = _groups(len(self.picture), pairs)[picture]
        best = np.empty(len(self.picture), np.uint32)
        best[group[::-1]] = rows[::-1]  # of equal places the last assignment stays: the best row
        kept = np.arange(self.count, dtype=np.uint32)
        kept[rows] = best[group]
        return kept


def find_copies(
    count: int,
    hashed: Hashed,
    bounds: DuplicateBounds,
    embeddings_of: EmbeddingsOf,
    run_all: RunAll = one_after_another,
) -> Copies:
    """The copies among `count` rows of which `hashed` have a hash.

    Takes 8 bytes a hashed row, 0.6 GB for the piece at work, 8 bytes a pair, and what `embeddings_of` takes for the rows
    that stand in a pair. The result doesn't depend on the order in which `run_all` brings the pieces.
    """
    picture = _pictures(hashed)
    first = np.flatnonzero(np.concatenate([[True], picture[1:] > np.maximum.accumulate(picture)[:-1]])[: len(picture)])
    pieces = pieces_of_work(len(first), bounds.max_hash_bits) if len(first) else []
    found = list(run_all(pairs_of_piece, np.ascontiguousarray(hashed.phash[first]), pieces))
    pairs = distinct_pairs(found)
    alike = pairs[_look_alike(pairs, hashed.rows[first], bounds.min_cosine, embeddings_of)]
    report = {
        "rows_with_hash": len(picture),
        "distinct_files": len(first),
        "pieces_of_work": len(pieces),
        "pairs_within_hash_bits": len(pairs),
        "pairs_alike": len(alike),
        **_long_runs(found),
    }
    return Copies(count, hashed.rows, picture, alike, report)


def _long_runs(found: Iterable[Found]) -> dict[str, int]:
    """Where more rows shared a key than were compared; 0 says that no pair within the bits was missed."""
    return {
        "long_runs": sum(f.long_runs for f in found),
        "most_rows_in_long_runs": max((f.rows_in_long_runs for f in found), default=0),
    }


def _pictures(hashed: Hashed) -> np.ndarray:
    """(R,) uint32: a number for each distinct digest, in the order of first appearance; without a digest its own."""
    rows = len(hashed.rows)
    first = np.arange(rows)
    if hashed.digest is not None:
        there = np.arange(rows) if hashed.has_digest is None else np.flatnonzero(hashed.has_digest)
        order = there[np.argsort(hashed.digest[there], kind="stable")]
        values = hashed.digest[order]
        begins = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
        first[order] = np.repeat(order[begins], np.diff(np.append(begins, len(order))))
    number = np.cumsum(first == np.arange(rows), dtype=np.uint32) - np.uint32(1)
    return number[first]


def _look_alike(pairs: np.ndarray, rows: np.ndarray, min_cosine: float, embeddings_of: EmbeddingsOf) -> np.ndarray:
    """(M,) bool: the embeddings of each pair agree, or one has none and the hash decides."""
    wanted = np.ones(len(pairs), bool)
    if not len(pairs):
        return wanted
    needed = np.unique(pairs)
    by_row = np.argsort(rows[needed])
    embeddings = embeddings_of(rows[needed][by_row])
    if embeddings is None:
        return wanted
    place = np.empty(len(needed), np.int64)
    place[by_row] = np.arange(len(needed))
    step = max(1, COSINE_BYTES // (4 * embeddings.shape[1]))
    for start in range(0, len(pairs), step):
        left, right = place[np.searchsorted(needed, pairs[start : start + step])].T
        cosine = np.einsum("nd,nd->n", embeddings[left], embeddings[right])
        wanted[start : start + step] = ~(cosine < min_cosine)
    return wanted


def _groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) uint32: the smallest number of each one's connected group."""
    group = np.arange(count, dtype=np.uint32)
    if len(pairs):
        members, ends = np.unique(pairs, return_inverse=True)
        left, right = ends.reshape(-1, 2).T
        graph = coo_matrix((np.ones(len(pairs), bool), (left, right)), shape=(len(members), len(members)))
        _, label = connected_components(graph, directed=False)
        smallest = np.empty(label.max() + 1, np.uint32)
        smallest[label[::-1]] = members[::-1]
        group[members] = smallest[label]
    return group


def embeddings_in_memory(embeddings: np.ndarray | None) -> EmbeddingsOf:
    """The `EmbeddingsOf` of (N, D) numbers that lie in memory; None: nobody has one."""
    return functools.partial(_rows_of, embeddings)


def _rows_of(embeddings: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if embeddings is None else embeddings[rows]
