"""Pairs within a few bits: all of them, each once, from pieces in any order."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from emu_ray.curation import copies
from emu_ray.curation.copies import bits_set, one_after_another, orders, pairs_of_order
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
    return sorted(tuple(p) for f in one_after_another(pairs_of_order, hashes, pieces) for p in f.pairs.tolist())


@pytest.mark.parametrize("as_if_rows", [400, 40_000, 10_000_000, 90_000_000])
@pytest.mark.parametrize("bits", [0, 1, 4, 6])
def test_every_pair_within_the_bits_is_found_exactly_once(bits: int, as_if_rows: int) -> None:
    hashes = near_hashes(200, bits + 2)
    pieces = orders(as_if_rows, bits)
    expected = by_brute_force(hashes, bits)
    assert len(expected) >= 60
    assert found(hashes, pieces) == expected


def test_layouts_grow_with_the_pool() -> None:
    blocks = {rows: len(orders(rows, 6)) for rows in (1000, 2_500_000, 10_000_000, 100_000_000)}
    assert blocks == {1000: 7, 2_500_000: 84, 10_000_000: 84, 100_000_000: 210 * 4}
    assert len(orders(10_000_000, 4)) == 15


def test_an_order_in_parts_finds_what_it_finds_whole() -> None:
    hashes = near_hashes(300, 6)
    parts = orders(600, 6, rows_at_once=100)
    assert {p.part_bits for p in parts} == {3} and len(parts) == 8 * len(orders(600, 6))
    assert found(hashes, parts) == found(hashes, orders(600, 6)) == by_brute_force(hashes, 6)


def test_a_piece_survives_pickling() -> None:
    piece = orders(10_000_000, 6)[5]
    assert pickle.loads(pickle.dumps(piece)) == piece


def test_too_many_bits_for_the_pool_are_refused() -> None:
    with pytest.raises(RecipeError, match="10000000 rows can't be compared within 20 bits: lower max_hash_bits"):
        orders(10_000_000, 20)


def test_blocks_of_rows_cut_no_run_of_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = near_hashes(200, 6)
    monkeypatch.setattr(copies, "_BLOCK", 7)
    assert found(hashes, orders(400, 6)) == by_brute_force(hashes, 6)


def crowd(count: int) -> np.ndarray:
    """Hashes that share their lower 56 bits: one run in most orders."""
    return RNG.integers(0, 2**8, count, dtype=np.uint64) << np.uint64(56)


def test_in_a_long_run_neighbours_by_hash_and_the_best_are_compared_and_the_run_is_told() -> None:
    hashes = crowd(300)
    first = dataclasses.replace(orders(300, 6)[0], window=2)
    whole = dataclasses.replace(first, window=300)
    told = pairs_of_order(hashes, first)
    assert (told.long_runs, told.rows_in_long_runs) == (1, 300)
    pairs = {tuple(p) for p in told.pairs.tolist()}
    everything = {tuple(p) for p in pairs_of_order(hashes, whole).pairs.tolist()}
    assert len(told.pairs) == len(pairs) and pairs < everything
    assert {p for p in everything if p[0] == 0} <= pairs  # row 0 is the best of the run
    order = np.lexsort((np.arange(300), hashes))
    beside = {tuple(sorted((int(order[i]), int(order[i + d])))) for d in (1, 2) for i in range(300 - d)}
    assert pairs == (beside & everything) | {p for p in everything if p[0] == 0}


def test_a_small_pool_is_compared_wholly_however_alike_its_hashes() -> None:
    hashes = crowd(300)
    pieces = orders(300, 4)
    assert found(hashes, pieces) == by_brute_force(hashes, 4)
    assert not any(f.long_runs for f in one_after_another(pairs_of_order, hashes, pieces))


def test_bits_are_counted_without_numpy_2_too(monkeypatch: pytest.MonkeyPatch) -> None:
    words = RNG.integers(0, 2**64, 100, dtype=np.uint64)
    expected = [bin(int(w)).count("1") for w in words]
    assert bits_set(words).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert bits_set(words).tolist() == expected


def test_no_hashes_have_no_pairs() -> None:
    for piece in itertools.islice(orders(0, 6), 2):
        assert len(pairs_of_order(np.empty(0, np.uint64), piece).pairs) == 0
