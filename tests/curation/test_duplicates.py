"""Copies: found by hash and embedding, grouped, and the best one kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from emu_ray.curation import duplicates
from emu_ray.curation.copies import one_after_another
from emu_ray.curation.duplicates import Copies, DuplicateBounds, Hashed, embeddings_in_memory, find_copies
from emu_ray.curation.perceptual_hash import as_integers, perceptual_hash
from emu_ray.errors import RecipeError

RNG = np.random.default_rng(0)


def copies_of(
    phash: np.ndarray,
    embeddings: np.ndarray | None,
    order: list[int],
    bounds: DuplicateBounds,
    digests: list[int] | None = None,
    run_all: Callable = one_after_another,
) -> Copies:
    rows = np.array(order, np.uint32)
    digest = None if digests is None else np.array(digests, np.uint64)[rows]
    hashed = Hashed(rows, phash[rows], digest)
    return find_copies(len(phash), hashed, bounds, embeddings_in_memory(embeddings), run_all)


def kept_rows(*arguments: Any) -> list[int]:
    return copies_of(*arguments).keeper().tolist()


def test_pictures_alike_in_layout_but_not_to_clip_are_no_copies() -> None:
    embeddings = np.eye(2, dtype=np.float32)
    same_hash = np.array([5, 5], np.uint64)
    assert kept_rows(same_hash, embeddings, [0, 1], DuplicateBounds()) == [0, 1]
    assert kept_rows(same_hash, embeddings[[0, 0]], [0, 1], DuplicateBounds()) == [0, 0]


def test_without_an_embedding_the_hash_decides() -> None:
    embeddings = np.array([[1, 0], [np.nan, np.nan], [0, 1]], np.float32)
    assert kept_rows(np.array([5, 5, 5], np.uint64), embeddings, [2, 0, 1], DuplicateBounds()) == [2, 2, 2]


def test_equal_bytes_are_copies_whatever_hash_and_embedding_say() -> None:
    phash = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert kept_rows(phash, np.eye(3, dtype=np.float32), [2, 1, 0], DuplicateBounds(), [7, 8, 7]) == [2, 1, 2]


def test_equal_bytes_are_searched_once() -> None:
    found = copies_of(np.zeros(500, np.uint64), None, [*range(500)], DuplicateBounds(), [1] * 499 + [2])
    assert found.report["distinct_files"] == 2 and found.report["pairs_within_hash_bits"] == 1
    assert found.keeper().tolist() == [0] * 500


def test_a_row_without_a_digest_is_its_own_file() -> None:
    hashed = Hashed(
        np.arange(3), np.array([1, 2**40, 2**63], np.uint64), np.zeros(3, np.uint64), np.array([1, 0, 0]) > 0
    )
    found = find_copies(3, hashed, DuplicateBounds(max_hash_bits=0), embeddings_in_memory(None))
    assert found.keeper().tolist() == [0, 1, 2]


def test_a_chain_of_copies_is_one_group_and_its_best_stays() -> None:
    chain = np.array([0b0, 0b1111, 0b11111111], np.uint64)
    assert kept_rows(chain, None, [1, 2, 0], DuplicateBounds(max_hash_bits=4)) == [1, 1, 1]


def test_a_row_that_does_not_take_part_binds_nobody() -> None:
    chain = np.array([0b0, 0b1111, 0b11111111], np.uint64)
    found = copies_of(chain, None, [1, 0, 2], DuplicateBounds(max_hash_bits=4))
    assert found.keeper().tolist() == [1, 1, 1]
    assert found.keeper(np.array([True, False, True])).tolist() == [0, 1, 2]


def test_where_the_best_of_equal_bytes_is_rejected_the_others_still_bind() -> None:
    phash = np.array([0, 0, 1], np.uint64)
    found = copies_of(phash, None, [0, 1, 2], DuplicateBounds(), [7, 7, 8])
    assert found.keeper(np.array([False, True, True])).tolist() == [0, 1, 1]


def test_the_order_in_which_pieces_come_back_changes_nothing() -> None:
    base = RNG.integers(0, 2**64, 200, dtype=np.uint64)
    phash = np.concatenate([base, base ^ np.uint64(0b10101), base ^ np.uint64(1 << 63)])
    embeddings = np.tile(RNG.normal(size=(200, 8)).astype(np.float32), (3, 1))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    order = RNG.permutation(600).tolist()

    def shuffled(function: Callable, shared: np.ndarray, pieces: list) -> list:
        return [function(shared, pieces[i]) for i in np.random.default_rng(3).permutation(len(pieces))]

    one = copies_of(phash, embeddings, order, DuplicateBounds())
    other = copies_of(phash, embeddings, order, DuplicateBounds(), None, shuffled)
    assert one.report == other.report and one.report["pairs_alike"] == 600
    assert one.keeper().tolist() == other.keeper().tolist()
    assert len(set(one.keeper().tolist())) == 200


def test_cosines_are_the_same_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    phash = np.repeat(np.arange(3, dtype=np.uint64) << np.uint64(30), 4)
    embeddings = np.eye(2, dtype=np.float32)[[0, 0, 1, 1] * 3]
    expected = kept_rows(phash, embeddings, [*range(12)], DuplicateBounds(max_hash_bits=0))
    assert expected == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    monkeypatch.setattr(duplicates, "COSINE_BYTES", 24)
    assert kept_rows(phash, embeddings, [*range(12)], DuplicateBounds(max_hash_bits=0)) == expected


def test_no_rows_have_no_copies() -> None:
    assert kept_rows(np.array([], np.uint64), None, [], DuplicateBounds()) == []


def test_bits_beyond_the_hash_are_refused() -> None:
    with pytest.raises(RecipeError, match="must be below 64, found 64"):
        DuplicateBounds(max_hash_bits=64)


def test_the_hash_survives_resizing_and_brightness_but_not_another_picture() -> None:
    from PIL import Image

    def picture(seed: int) -> np.ndarray:
        patches = np.random.default_rng(seed).integers(0, 230, (6, 6, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(patches).resize((96, 96), Image.Resampling.BICUBIC))

    one, other = picture(1), picture(2)
    again = np.asarray(Image.fromarray(one).resize((80, 80))).astype(float) * 1.05
    hashes = as_integers([perceptual_hash(p) for p in (one, again.astype(np.uint8), other)])
    distance = [bin(int(hashes[0]) ^ int(h)).count("1") for h in hashes]
    assert distance[1] <= 4 < 12 < distance[2]
