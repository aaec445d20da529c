"""Finds copies of the same picture and says which one stays. Pure: hashes and embeddings in, keys out.

Candidates by perceptual hash alone are many where pictures share a layout, so a pair must also look alike to CLIP.
Everything lies in one process's memory: fit for some millions of rows, not for a billion.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from emu_ray.curation.perceptual_hash import BITS

CHUNK = 2048  # rows compared at once inside one bucket


@dataclass(frozen=True, kw_only=True)
class DuplicateBounds:
    """Two pictures are copies when their bytes are equal, or when both bounds hold."""

    max_hash_bits: int = 6  # differing bits of the 64-bit perceptual hash
    min_cosine: float = 0.95  # of the CLIP embeddings; pairs without embeddings need the hash alone


def copy_pairs(
    phash: np.ndarray, embeddings: np.ndarray | None, bounds: DuplicateBounds, digests: np.ndarray | None = None
) -> np.ndarray:
    """(M, 2) row numbers of pairs within the bounds, each pair at least once.

    Two hashes within k bits agree wholly in one of k + 1 bands (pigeonhole): only rows that share one are compared.
    """
    found = [np.empty((0, 2), np.int64)]
    for band in _bands(phash, bounds.max_hash_bits):
        for rows in _buckets(band):
            parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            for i, left in enumerate(parts):
                found += [_within(left, right, phash, embeddings, bounds) for right in parts[i:]]
    if digests is not None:
        found += [np.stack([rows[:-1], rows[1:]], axis=1) for rows in _buckets(digests)]
    return np.concatenate(found)


def keepers(
    count: int, pairs: np.ndarray, quality_order: np.ndarray, taking_part: np.ndarray | None = None
) -> np.ndarray:
    """(count,) the row kept for each row; rows not `taking_part` (a mask) keep themselves and bind nobody."""
    if taking_part is not None:
        pairs = pairs[taking_part[pairs].all(axis=1)]
    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, group = connected_components(graph, directed=False)
    place = np.empty(count, np.int64)
    place[quality_order] = np.arange(count)
    best = np.full(group.max(initial=-1) + 1, count, np.int64)
    np.minimum.at(best, group, place)
    return np.asarray(quality_order, np.int64)[best[group]]


def _bands(phash: np.ndarray, max_bits: int) -> list[np.ndarray]:
    edges = np.linspace(0, BITS, max_bits + 2).astype(int)
    masks = [np.array((1 << int(high - low)) - 1, np.uint64) for low, high in itertools.pairwise(edges)]
    return [(phash >> np.uint64(low)) & mask for low, mask in zip(edges[:-1], masks, strict=True)]


def _buckets(values: np.ndarray) -> list[np.ndarray]:
    """Row numbers of equal values, for values that occur more than once."""
    if not len(values):
        return []
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
    return [rows for rows in np.split(order, ends) if len(rows) > 1]


def _within(
    left: np.ndarray,
    right: np.ndarray,
    phash: np.ndarray,
    embeddings: np.ndarray | None,
    bounds: DuplicateBounds,
) -> np.ndarray:
    bits = _ones(phash[left][:, None] ^ phash[right][None])
    i, j = np.nonzero((bits <= bounds.max_hash_bits) & (left[:, None] != right[None]))
    pairs = np.stack([left[i], right[j]], axis=1)
    if embeddings is None or not len(pairs):
        return pairs
    cosine = np.einsum("nd,nd->n", embeddings[pairs[:, 0]], embeddings[pairs[:, 1]])
    return pairs[~(cosine < bounds.min_cosine)]  # a NaN (no embedding) leaves the hash to decide


def _ones(words: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set; numpy 1 has no bitwise_count."""
    bytes_set = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)
    return bytes_set[words[..., None].view(np.uint8)].sum(-1)
