"""Copies: found by hash and embedding, grouped, and the best one kept."""

from __future__ import annotations

import numpy as np

from emu_ray.curation.duplicates import DuplicateBounds, copy_pairs, keepers
from emu_ray.curation.perceptual_hash import as_integers, perceptual_hash

RNG = np.random.default_rng(0)


def kept_rows(
    phash: np.ndarray,
    embeddings: np.ndarray | None,
    order: list[int],
    bounds: DuplicateBounds,
    digests: np.ndarray | None = None,
) -> list[int]:
    pairs = copy_pairs(phash, embeddings, bounds, digests)
    return keepers(len(phash), pairs, np.array(order, np.int64)).tolist()


def test_banded_candidates_are_exactly_the_pairs_within_the_bits() -> None:
    base = RNG.integers(0, 2**64, 40, dtype=np.uint64)
    flips = np.array([sum(1 << int(b) for b in RNG.choice(64, k % 9, replace=False)) for k in range(40)], np.uint64)
    phash = np.concatenate([base, base ^ flips])
    for bits in (0, 1, 4, 6):
        bounds = DuplicateBounds(max_hash_bits=bits)
        found = {tuple(sorted(p)) for p in copy_pairs(phash, None, bounds).tolist()}
        distance = [[bin(int(a) ^ int(b)).count("1") for b in phash] for a in phash]
        assert found == {(i, j) for i in range(80) for j in range(i + 1, 80) if distance[i][j] <= bits}


def test_pictures_alike_in_layout_but_not_to_clip_are_no_copies() -> None:
    embeddings = np.eye(2, dtype=np.float32)
    same_hash = np.array([5, 5], np.uint64)
    assert kept_rows(same_hash, embeddings, [0, 1], DuplicateBounds()) == [0, 1]
    assert kept_rows(same_hash, embeddings[[0, 0]], [0, 1], DuplicateBounds()) == [0, 0]


def test_equal_bytes_are_copies_whatever_hash_and_embedding_say() -> None:
    digests = np.array(["a", "b", "a"])
    phash = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert kept_rows(phash, np.eye(3, dtype=np.float32), [2, 1, 0], DuplicateBounds(), digests) == [2, 1, 2]


def test_a_chain_of_copies_is_one_group_and_its_best_stays() -> None:
    chain = np.array([0b0, 0b1111, 0b11111111], np.uint64)
    assert kept_rows(chain, None, [1, 2, 0], DuplicateBounds(max_hash_bits=4)) == [1, 1, 1]


def test_a_row_that_does_not_take_part_binds_nobody() -> None:
    pairs = np.array([[0, 1], [1, 2]])
    everyone = keepers(3, pairs, np.array([1, 0, 2]))
    assert everyone.tolist() == [1, 1, 1]
    without = keepers(3, pairs, np.array([1, 0, 2]), np.array([True, False, True]))
    assert without.tolist() == [0, 1, 2]


def test_no_rows_have_no_copies() -> None:
    assert kept_rows(np.array([], np.uint64), None, [], DuplicateBounds()) == []


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
