"""Pairs of 64-bit hashes that differ in few bits, among many millions, in pieces that need not know each other.

Exact as long as no key is shared by more than WINDOW rows; where it is, `Found` counts it.

The 64 bits are cut into m blocks. Hashes within k bits agree wholly on at least m - k blocks (pigeonhole), so they are
neighbours in one of the C(m, k) orders by m - k of the blocks: Manku, Jain and Das Sarma, "Detecting near-duplicates for
web crawling", WWW 2007, section 3. Each order is a piece of work of its own; nothing but the hash array is shared.

A shuffle of the rows would do the same and is not used: each row would cross the network C(m, k) times (84 times 24
bytes for ten million rows), while the hash array crosses once a node, 8 bytes a row. What that means for a billion
pairs, calculated from what ten million take (1.1 CPU seconds an order) and not measured: 8 GB a node, 210 orders in 32
parts, and, since each part reads all hashes, about 20 CPU hours, which any number of workers share; the driver's node
needs 160 GB for the facts of `row_rules.py` and what is sorted beside them. Rows are numbered in 32 bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emu_ray.curation.perceptual_hash import BITS
from emu_ray.errors import RecipeError

MAX_BUCKET = 24  # rows of equal key by chance; comparing 24 neighbours costs a third of the sort (2026-11, EPYC)
MAX_ORDERS = 20_000
WINDOW = 64  # rows of equal key beyond this many neighbours are not compared
WHOLE_COMPARISONS = 20_000_000  # so many a piece are always affordable: a small pool has a wider window
ROWS_AT_ONCE = 1 << 25  # of a piece: about 0.6 GB while it is compared
_BLOCK = 1 << 18  # rows compared at once, 2 MB: stays in the cache
_DENSE = 8  # offsets up to which whole blocks are compared instead of picked rows

RunAll = Callable[[Callable[[Any, Any], Any], Any, Sequence[Any]], Iterable[Any]]
# (function, what all pieces share, pieces) -> function(shared, piece) for each piece, in any order


def one_after_another(function: Callable[[Any, Any], Any], shared: Any, pieces: Sequence[Any]) -> Iterator[Any]:
    """The `RunAll` of one process."""
    return (function(shared, piece) for piece in pieces)


@dataclass(frozen=True)
class Piece:
    """One order of the hashes, or the part of it whose keys begin with `part`."""

    max_bits: int  # hashes that differ in at most so many bits are wanted
    edges: tuple[int, ...]  # (m + 1,) bits at which the blocks begin and end
    blocks: tuple[int, ...]  # the numbers of the m - k blocks that make the key
    window: int
    part_bits: int = 0  # the order is cut into 2 ** part_bits parts
    part: int = 0

    def mask_of(self, block: int) -> int:
        """The bits of a block."""
        return (1 << self.edges[block + 1]) - (1 << self.edges[block])

    @property
    def key_bits(self) -> int:
        """Length of the key."""
        return sum(self.edges[b + 1] - self.edges[b] for b in self.blocks)


@dataclass(frozen=True)
class Found:
    """What one piece found."""

    pairs: np.ndarray  # (M, 2) uint32 row numbers, the smaller first
    long_runs: int  # keys that more than `window` + 1 rows share: only neighbours by hash were compared there
    rows_in_long_runs: int


def orders(rows: int, max_bits: int, rows_at_once: int = ROWS_AT_ONCE) -> list[Piece]:
    """The pieces that together find every pair within `max_bits`, for a pool of `rows` hashes.

    Of the layouts the one with the fewest blocks is taken whose keys are shared by fewer than MAX_BUCKET rows by
    chance: for 6 bits 84 orders from 1.5 to 60 million rows, 210 up to 1.2 billion. RecipeError when more than
    MAX_ORDERS would be needed.
    """
    for m in range(max_bits + 1, BITS + 1):
        kept = m - max_bits
        if rows / 2.0 ** (BITS * kept / m) < MAX_BUCKET:
            break
    if math.comb(m, kept) > MAX_ORDERS:
        raise RecipeError(f"{rows} rows can't be compared within {max_bits} bits: lower max_hash_bits (6 is usual)")
    edges = tuple(int(e) for e in np.linspace(0, BITS, m + 1).astype(int))
    window = max(WINDOW, WHOLE_COMPARISONS // max(rows, 1))
    part_bits = max(0, math.ceil(math.log2(max(rows, 1) / rows_at_once)))
    return [
        Piece(max_bits, edges, blocks, window, part_bits, part)
        for blocks in itertools.combinations(range(m), kept)
        for part in range(2**part_bits)
    ]


def pairs_of_order(hashes: np.ndarray, piece: Piece) -> Found:
    """The pairs that agree on the piece's blocks and on no combination of blocks before it; pure.

    `hashes` is (N,) uint64, best row first: where a key is shared by more rows than the window, they are compared in
    the order of hash and goodness, and each with the best of them.
    """
    row_bits = max(1, int(len(hashes) - 1).bit_length()) if len(hashes) else 1
    packed = _sorted_keys(hashes, piece, row_bits)
    found = [np.empty((0, 2), np.uint32)]
    long_runs = rows_in_long_runs = 0
    for start, end in _cuts(packed, row_bits):
        rows = (packed[start:end] & np.uint64((1 << row_bits) - 1)).astype(np.int64)
        keys = packed[start:end] >> np.uint64(row_bits)
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        lengths = np.diff(np.append(first, len(keys)))
        is_long = lengths > piece.window + 1
        if is_long.any():
            long_runs += int(is_long.sum())
            rows_in_long_runs += int(lengths[is_long].sum())
            rows, with_best = _by_hash(hashes, rows, first[is_long], lengths[is_long], piece.window)
            found.append(_within(hashes, with_best, piece))
        near = _neighbours(hashes[rows], keys, first, lengths, piece)
        found += [_within(hashes, np.stack([rows[at], rows[at + d]], axis=1), piece) for d, at in near]
    return Found(np.concatenate(found), long_runs, rows_in_long_runs)


def bits_set(words: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    bytes_set = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)  # numpy 1
    return bytes_set[np.ascontiguousarray(words)[..., None].view(np.uint8)].sum(-1, dtype=np.uint8)


def _sorted_keys(hashes: np.ndarray, piece: Piece, row_bits: int) -> np.ndarray:
    """(R,) uint64 sorted: the key above the row number. A key too long for that is cut; `_within` sees the rest."""
    cut = max(0, piece.key_bits + row_bits - BITS)
    numbers = np.arange(min(_BLOCK, len(hashes)), dtype=np.uint64)
    parts = [np.empty(0, np.uint64)]
    for start in range(0, len(hashes), _BLOCK):
        some = hashes[start : start + _BLOCK]
        key = np.zeros(len(some), np.uint64)
        for block in piece.blocks:
            low, high = piece.edges[block], piece.edges[block + 1]
            key <<= np.uint64(high - low)
            key |= (some >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        row = numbers[: len(some)] + np.uint64(start)
        if piece.part_bits:
            inside = (key >> np.uint64(piece.key_bits - piece.part_bits)) == piece.part
            key, row = key[inside], row[inside]
        parts.append(((key >> np.uint64(cut)) << np.uint64(row_bits)) | row)
    packed = np.concatenate(parts)
    packed.sort()
    return packed


def _cuts(packed: np.ndarray, row_bits: int) -> Iterator[tuple[int, int]]:
    """Slices of about _BLOCK rows that cut no run of equal keys."""
    start, rows = 0, np.uint64((1 << row_bits) - 1)
    while start < len(packed):
        last = packed[min(start + _BLOCK, len(packed)) - 1]
        end = int(np.searchsorted(packed, last | rows, side="right"))
        yield start, end
        start = end


def _by_hash(
    hashes: np.ndarray, rows: np.ndarray, first: np.ndarray, lengths: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` with the long runs put in the order of their hashes; and pairs of each run's best with those far from it."""
    run = np.repeat(np.arange(len(first)), lengths)
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    at = np.arange(len(run)) - np.repeat(before - first, lengths)
    best = np.repeat(rows[first], lengths)  # rows of a run stand best first
    order = np.lexsort((rows[at], hashes[rows[at]], run))
    sorted_rows = rows[at][order]
    place_of_best = np.repeat(np.flatnonzero(sorted_rows == best), lengths)
    is_far = np.abs(np.arange(len(run)) - place_of_best) > window
    rows = rows.copy()
    rows[at] = sorted_rows
    return rows, np.stack([best[is_far], sorted_rows[is_far]], axis=1)


def _neighbours(
    hashes: np.ndarray, keys: np.ndarray, first: np.ndarray, lengths: np.ndarray, piece: Piece
) -> Iterator[tuple[int, np.ndarray]]:
    """(offset, places): the row at each place and the one `offset` after it have one key and hashes within the bits."""
    longest = int(min(lengths.max(initial=1), piece.window + 1))
    left = np.repeat(first + lengths, lengths) - np.arange(len(keys)) if longest > _DENSE + 1 else keys[:0]
    at = np.flatnonzero(left > _DENSE)
    for d in range(1, longest):
        if d <= _DENSE:
            near = np.flatnonzero(bits_set(hashes[:-d] ^ hashes[d:]) <= piece.max_bits)
            near = near[keys[near] == keys[near + d]]
        else:
            at = at[left[at] > d]
            near = at[bits_set(hashes[at] ^ hashes[at + d]) <= piece.max_bits]
        if len(near):
            yield d, near


def _within(hashes: np.ndarray, pairs: np.ndarray, piece: Piece) -> np.ndarray:
    """The pairs within the bits for which this piece is the first that could find them."""
    differ = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
    wanted = bits_set(differ) <= piece.max_bits
    for block in range(max(piece.blocks) + 1):
        agrees = (differ & np.uint64(piece.mask_of(block))) == 0
        wanted &= agrees if block in piece.blocks else ~agrees
    return np.sort(pairs[wanted], axis=1).astype(np.uint32)
