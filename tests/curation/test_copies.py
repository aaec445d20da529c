"""Pairs within a few bits: all of them, each once, from pieces in any order."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from emu_ray.curation import copies
from emu_ray.curation.copies import bits_set, distinct_pairs, one_after_another, pairs_of_piece, pieces_of_work
from emu_ray.errors import RecipeError

RNG = np.random.default_rng(0)


def near_hashes(count: int, most_bits: int) -> np.ndarray:
    """Random hashes, and of each a neighbour up to `most_bits` away."""
    base = RNG.integers(0, 2**64, count, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in RNG.choice(64, k % (most_bits + 1), replace=False)) for k in range(count)]
    return RNG.permutation(np.concatenate([base, base ^ np.array(flips, np.uint64)]))


def by_brute_force(hashes: np.ndarray, bits: int) -> list[tuple[int, int]]:
    near = bits_set(hashes[:, None] ^ hashes[None]) <= bits
    return list(zip(*(n.tolist() for n in np.nonzero(np.triu(near, 1))), strict=True))


def found(hashes: np.ndarray, pieces: list[copies.Piece]) -> list[tuple[int, int]]:
    return [tuple(p) for p in distinct_pairs(one_after_another(pairs_of_piece, hashes, pieces)).tolist()]


@pytest.mark.parametrize("as_if_rows", [400, 40_000, 10_000_000, 90_000_000])
@pytest.mark.parametrize("bits", [0, 1, 4, 6])
def test_every_pair_within_the_bits_is_found_exactly_once(bits: int, as_if_rows: int) -> None:
    hashes = near_hashes(200, bits + 2)
    pieces = pieces_of_work(as_if_rows, bits)
    expected = by_brute_force(hashes, bits)
    assert len(expected) >= 60
    assert found(hashes, pieces) == expected


def orders_of(pieces: list[copies.Piece]) -> int:
    return len({(p.leading, other) for p in pieces for other in p.others})


def test_layouts_grow_with_the_pool() -> None:
    found = {rows: orders_of(pieces_of_work(rows, 6)) for rows in (1000, 2_500_000, 10_000_000, 100_000_000)}
    assert found == {1000: 7, 2_500_000: 84, 10_000_000: 84, 100_000_000: 210}
    assert orders_of(pieces_of_work(10_000_000, 4)) == 15


@pytest.mark.parametrize("rows", [20_000, 2_500_000, 100_000_000, 1_000_000_000])
def test_pieces_are_alike_in_size_and_together_all_values_of_all_orders(rows: int) -> None:
    pieces = pieces_of_work(rows, 6)
    ends: dict[tuple[int, ...], int] = {}
    for piece in pieces:
        share = (piece.end - piece.first) / 2 ** piece.bits_of(piece.leading)
        assert share * rows <= 1.1 * copies.ROWS_AT_ONCE
        assert share * len(piece.others) <= 1.1 * copies.ORDERS_AT_ONCE
        assert piece.first == ends.get(piece.leading + piece.others[0], 0)
        ends[piece.leading + piece.others[0]] = piece.end
    assert all(ends[p.leading + p.others[0]] == 2 ** p.bits_of(p.leading) for p in pieces)


def test_an_order_in_parts_finds_what_it_finds_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_BUCKET", 2)
    hashes = near_hashes(300, 6)
    parts = pieces_of_work(40_000, 6, rows_at_once=5_000)
    assert len(parts) >= 8 and parts[0].leading
    assert found(hashes, parts) == found(hashes, pieces_of_work(600, 6)) == by_brute_force(hashes, 6)


def test_values_longer_than_a_digit_are_sorted_and_equal_ones_stay_as_they_stood() -> None:
    values = RNG.integers(0, 2**40, 1000, dtype=np.uint64) % np.uint64(2**37 + 5)
    values[500:] = values[:500]
    assert copies._stable_order(values, 40).tolist() == np.argsort(values, kind="stable").tolist()


def test_a_piece_survives_pickling() -> None:
    piece = pieces_of_work(10_000_000, 6)[5]
    assert pickle.loads(pickle.dumps(piece)) == piece


def test_too_many_bits_for_the_pool_are_refused() -> None:
    with pytest.raises(RecipeError, match="10000000 rows can't be compared within 20 bits: lower max_hash_bits"):
        pieces_of_work(10_000_000, 20)


def crowd(count: int) -> np.ndarray:
    """Hashes that share their lower 56 bits: one run in most orders."""
    return RNG.integers(0, 2**8, count, dtype=np.uint64) << np.uint64(56)


def test_in_a_long_run_neighbours_by_hash_and_the_best_are_compared_and_the_run_is_told() -> None:
    hashes = crowd(300)
    first = dataclasses.replace(pieces_of_work(300, 6)[0], window=2)
    whole = dataclasses.replace(first, window=300)
    told = pairs_of_piece(hashes, first)
    assert (told.long_runs, told.rows_in_long_runs) == (1, 300)
    pairs = {tuple(p) for p in told.pairs.tolist()}
    everything = {tuple(p) for p in pairs_of_piece(hashes, whole).pairs.tolist()}
    assert len(told.pairs) == len(pairs) and pairs < everything
    assert {p for p in everything if p[0] == 0} <= pairs  # row 0 is the best of the run
    order = np.lexsort((np.arange(300), hashes))
    beside = {tuple(sorted((int(order[i]), int(order[i + d])))) for d in (1, 2) for i in range(300 - d)}
    assert pairs == (beside & everything) | {p for p in everything if p[0] == 0}


def test_a_pair_in_a_long_run_of_one_order_is_found_by_another() -> None:
    hashes = np.concatenate([crowd(300), RNG.integers(0, 2**64, 1, dtype=np.uint64)])
    hashes[:300] ^= RNG.integers(0, 2**28, 300, dtype=np.uint64) << np.uint64(20)
    hashes[300] = hashes[17] ^ np.uint64(1 << 63)
    pieces = [dataclasses.replace(p, window=2) for p in pieces_of_work(300, 6)]
    everything = list(one_after_another(pairs_of_piece, hashes, pieces))
    assert sum(f.long_runs for f in everything)
    assert (17, 300) in found(hashes, pieces)


def test_pairs_found_often_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MERGED_FROM", 4)
    some = np.array([[0, 1], [5, 2**32 - 1], [3, 4]], np.uint32)
    assert distinct_pairs(copies.Found(some[[i % 3, 1]], 0, 0) for i in range(50)).tolist() == [
        [0, 1], [3, 4], [5, 2**32 - 1],
    ]  # fmt: skip
    assert distinct_pairs([]).shape == (0, 2)


def test_a_small_pool_is_compared_wholly_however_alike_its_hashes() -> None:
    hashes = crowd(300)
    pieces = pieces_of_work(300, 4)
    assert found(hashes, pieces) == by_brute_force(hashes, 4)
    assert not any(f.long_runs for f in one_after_another(pairs_of_piece, hashes, pieces))


def test_bits_are_counted_without_numpy_2_too(monkeypatch: pytest.MonkeyPatch) -> None:
    words = RNG.integers(0, 2**64, 100, dtype=np.uint64)
    expected = [bin(int(w)).count("1") for w in words]
    assert bits_set(words).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert bits_set(words).tolist() == expected


def test_no_hashes_have_no_pairs() -> None:
    for piece in itertools.islice(pieces_of_work(0, 6), 2):
        assert len(pairs_of_piece(np.empty(0, np.uint64), piece).pairs) == 0
