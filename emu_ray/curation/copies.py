"""Pairs of 64-bit hashes that differ in few bits, among many millions, in pieces that need not know each other.

A pair is missed only where in each of its orders more than WINDOW rows share its key; `Found` counts such keys.

The 64 bits are cut into m blocks. Hashes within k bits agree wholly on at least m - k blocks (pigeonhole), so they are
neighbours in one of the C(m, k) orders by m - k of the blocks: Manku, Jain and Das Sarma, "Detecting near-duplicates for
web crawling", WWW 2007, section 3. Orders that share their leading blocks are made together: the hashes are dealt to
buckets by these once, and a bucket, which fits a processor's cache, is sorted by the other blocks of each order. So the
time a row is the same for two million hashes and for ten.

A shuffle of the rows would do the same and is not used: each row would cross the network C(m, k) times (84 times 24
bytes for ten million rows), while the hash array crosses once a node, 8 bytes a row. Rows are numbered in 32 bits.
What it takes, and what that means for a billion, stands in EXPERIMENTS.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emu_ray.curation.perceptual_hash import BITS
from emu_ray.errors import RecipeError

MAX_SHARED_KEY = 24  # rows of equal key by chance; comparing 24 neighbours costs a third of the sort (2026-11, EPYC)
MAX_ORDERS = 20_000
WINDOW = 64  # rows of equal key beyond this many neighbours are not compared
WHOLE_COMPARISONS = 20_000_000  # so many an order are always affordable: a small pool has a wider window
ROWS_AT_ONCE = 1 << 24  # of a piece: about 0.5 GB while it is compared
ORDERS_AT_ONCE = 4  # about so many passes over all rows make a piece
_BUCKET = 1 << 14  # rows; below it a sort costs less than its call
_DIGIT = 16  # bits that numpy's stable sort takes at once, by radix
MERGED_FROM = 1 << 20  # pairs
_DENSE = 8  # offsets up to which whole buckets are compared instead of picked rows

RunAll = Callable[[Callable[[Any, Any], Any], Any, Sequence[Any]], Iterable[Any]]
# (function, what all pieces share, pieces) -> function(shared, piece) for each piece, in any order


def one_after_another(function: Callable[[Any, Any], Any], shared: Any, pieces: Sequence[Any]) -> Iterator[Any]:
    """The `RunAll` of one process."""
    return (function(shared, piece) for piece in pieces)


@dataclass(frozen=True)
class Piece:
    """Some orders of the hashes whose leading blocks lie in a range of values."""

    max_bits: int  # hashes that differ in at most so many bits are wanted
    edges: tuple[int, ...]  # (m + 1,) bits at which the blocks begin and end
    leading: tuple[int, ...]  # the numbers of the blocks that all keys begin with
    others: tuple[tuple[int, ...], ...]  # of each order: the other blocks of its key
    first: int  # value of the leading blocks
    end: int  # one beyond the last value
    window: int

    def bits_of(self, blocks: tuple[int, ...]) -> int:
        """How many bits the blocks have."""
        return sum(self.edges[b + 1] - self.edges[b] for b in blocks)

    def bits_in(self, hashes: np.ndarray, block: int) -> np.ndarray:
        """(N,) the bits of this block, of the least type that holds them."""
        mask = (1 << self.bits_of((block,))) - 1
        return ((hashes >> np.uint64(self.edges[block])) & np.uint64(mask)).astype(np.min_scalar_type(mask))

    def key(self, values: Mapping[int, np.ndarray], blocks: tuple[int, ...]) -> np.ndarray:
        """(N,) the bits of these blocks, `values` by block, one after another; of the least type that holds them."""
        kind = np.min_scalar_type((1 << self.bits_of(blocks)) - 1)
        key = values[blocks[0]].astype(kind)
        for block in blocks[1:]:
            key <<= kind.type(self.bits_of((block,)))
            key |= values[block].astype(kind, copy=False)
        return key


@dataclass(frozen=True)
class Found:
    """What one piece found; another piece may find the same pair."""

    pairs: np.ndarray  # (M, 2) uint32 row numbers, the smaller first, all different
    long_runs: int  # keys that more than `window` + 1 rows share: only neighbours by hash were compared there
    rows_in_long_runs: int


def pieces_of_work(rows: int, max_bits: int, rows_at_once: int = ROWS_AT_ONCE) -> list[Piece]:
    """The pieces that together find every pair within `max_bits`, for a pool of `rows` hashes.

    Of the layouts the one with the fewest blocks is taken whose keys are shared by fewer than MAX_SHARED_KEY rows by
    chance: for 6 bits 84 orders from 1.5 to 50 million rows, 210 up to 1.2 billion. RecipeError when more than
    MAX_ORDERS would be needed.
    """
    for m in range(max_bits + 1, BITS + 1):
        kept = m - max_bits
        if rows / 2.0 ** (BITS * kept / m) < MAX_SHARED_KEY:
            break
    if math.comb(m, kept) > MAX_ORDERS:
        raise RecipeError(f"{rows} rows can't be compared within {max_bits} bits: lower max_hash_bits (6 is usual)")
    edges = tuple(int(e) for e in np.linspace(0, BITS, m + 1).astype(int))
    window = max(WINDOW, WHOLE_COMPARISONS // max(rows, 1))
    shared = 0
    while shared < kept - 1 and rows >> edges[shared + 1] >= _BUCKET:
        shared += 1
    pieces = []
    for leading in itertools.combinations(range(m), shared):
        after = range(leading[-1] + 1 if leading else 0, m)
        others = tuple(itertools.combinations(after, kept - shared))
        if not others:
            continue
        layout = Piece(max_bits, edges, leading, others, 0, 0, window)
        groups = [others] if leading else [(each,) for each in others]
        for group in groups:
            values = 1 << layout.bits_of(leading)
            parts = max(math.ceil(len(group) / ORDERS_AT_ONCE), math.ceil(rows / rows_at_once))
            step = math.ceil(values / parts)
            pieces += [
                Piece(max_bits, edges, leading, group, first, min(first + step, values), window)
                for first in range(0, values, step)
            ]
    return pieces


def pairs_of_piece(hashes: np.ndarray, piece: Piece) -> Found:
    """The pairs within the bits that agree on the blocks of one of the piece's orders; pure.

    `hashes` is (N,) uint64, best row first: where a key is shared by more rows than the window, they are compared in
    the order of hash and goodness, and each with the best of them.
    """
    pairs = [np.empty((0, 2), np.uint32)]
    long_runs = rows_in_long_runs = 0
    for rows in _buckets(hashes, piece):
        words = hashes[rows]
        values = {b: piece.bits_in(words, b) for b in {b for blocks in piece.others for b in blocks}}
        found = [_pairs_of_order(words, piece.key(values, blocks), piece, blocks) for blocks in piece.others]
        pairs.append(rows[distinct_pairs(found)])
        long_runs += sum(f.long_runs for f in found)
        rows_in_long_runs += sum(f.rows_in_long_runs for f in found)
    return Found(np.concatenate(pairs), long_runs, rows_in_long_runs)


def distinct_pairs(found: Iterable[Found]) -> np.ndarray:
    """(M, 2) uint32, sorted: each pair once. Holds at most about three times as many as there are different ones."""
    held, new, count = np.empty(0, np.uint64), [], 0
    for one in found:
        if len(one.pairs):
            new.append((one.pairs[:, 0].astype(np.uint64) << np.uint64(32)) | one.pairs[:, 1])
            count += len(one.pairs)
        if count > max(len(held), MERGED_FROM):
            held, new, count = np.unique(np.concatenate([held, *new])), [], 0
    held = np.unique(np.concatenate([held, *new])) if new else held
    return np.stack([held >> np.uint64(32), held & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)


def _buckets(hashes: np.ndarray, piece: Piece) -> Iterator[np.ndarray]:
    """Row numbers (uint32, ascending) of two or more hashes with the same leading blocks, value after value."""
    if not piece.leading:
        yield np.arange(len(hashes), dtype=np.uint32)
        return
    value = piece.key({b: piece.bits_in(hashes, b) for b in piece.leading}, piece.leading)
    rows = np.flatnonzero((value >= piece.first) & (value < piece.end)).astype(np.uint32)
    value = value[rows] - value.dtype.type(piece.first)
    order = _stable_order(value, piece.bits_of(piece.leading))
    ends = np.cumsum(np.bincount(value.astype(np.int64), minlength=piece.end - piece.first))
    rows = rows[order]
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        if end - start > 1:
            yield rows[start:end]


def _pairs_of_order(words: np.ndarray, keys: np.ndarray, piece: Piece, blocks: tuple[int, ...]) -> Found:
    """The same among the hashes `words` of one bucket, ordered by `keys`; the pairs are places in the bucket."""
    places = _stable_order(keys, piece.bits_of(blocks))
    keys = keys[places]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    lengths = np.diff(np.append(first, len(keys)))
    found = [np.empty((0, 2), np.uint32)]
    is_long = lengths > piece.window + 1
    long_runs, rows_in_long_runs = int(is_long.sum()), 0
    if long_runs:
        rows_in_long_runs = int(lengths[is_long].sum())
        places, with_best = _by_hash(words, places, first[is_long], lengths[is_long], piece.window)
        found.append(_within(words, with_best, piece.max_bits))
    for distance, at in _neighbours(words[places], keys, first, lengths, piece):
        found.append(np.sort(np.stack([places[at], places[at + distance]], axis=1), axis=1).astype(np.uint32))
    return Found(np.concatenate(found), long_runs, rows_in_long_runs)


def _stable_order(values: np.ndarray, bits: int) -> np.ndarray:
    """The places of the unsigned `values` (N,) below 2 ** bits from least to greatest, equal ones as they stood."""
    order = np.argsort(values.astype(np.uint16), kind="stable")  # the cast keeps the lowest 16 bits
    for shift in range(_DIGIT, bits, _DIGIT):
        digit = (values[order] >> values.dtype.type(shift)).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order


def bits_set(words: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    bytes_set = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)  # numpy 1
    return bytes_set[np.ascontiguousarray(words)[..., None].view(np.uint8)].sum(-1, dtype=np.uint8)


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
    is_longer = lengths > _DENSE
    starts, lengths = first[is_longer], lengths[is_longer]
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())  # rows of the run from this one on
    at = np.repeat(starts + lengths, lengths) - left
    for d in range(1, longest):
        if d <= _DENSE:
            near = np.flatnonzero(bits_set(hashes[:-d] ^ hashes[d:]) <= piece.max_bits)
            near = near[keys[near] == keys[near + d]]
        else:
            at, left = at[left > d], left[left > d]
            near = at[bits_set(hashes[at] ^ hashes[at + d]) <= piece.max_bits]
        if len(near):
            yield d, near


def _within(hashes: np.ndarray, pairs: np.ndarray, max_bits: int) -> np.ndarray:
    """The pairs that differ in at most `max_bits`, the smaller number first."""
    near = bits_set(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= max_bits
    return np.sort(pairs[near], axis=1).astype(np.uint32)
