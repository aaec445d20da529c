"""What a haystack pool promises: the same bytes for a seed, known quality, and every planted defect with its truth."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, UnidentifiedImageError

from emu_ray.evaluation.prompts import haystack_prompts
from emu_ray.haystack.pool import HaystackChunk, HaystackSource, PlantedShares, chunk_table
from emu_ray.haystack.world import read_caption

SOURCE = HaystackSource(rows=160, side_px=64, seed=31, rows_per_chunk=80)


@pytest.fixture(scope="module")
def tables() -> list[pa.Table]:
    return [chunk_table(chunk) for chunk in SOURCE.chunks()]


@pytest.fixture(scope="module")
def rows(tables: list[pa.Table]) -> list[dict]:
    return [{**row, "truth": json.loads(row["truth"])} for row in pa.concat_tables(tables).to_pylist()]


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tables: list[pa.Table]) -> None:
    assert chunk_table(SOURCE.chunks()[0]).equals(tables[0])
    other = HaystackSource(rows=160, side_px=64, seed=32, rows_per_chunk=80).chunks()[0]
    assert chunk_table(HaystackChunk(other.source, 0, 4))["image"][0] != tables[0]["image"][0]


def test_a_chunk_does_not_depend_on_the_chunks_made_before_it(tables: list[pa.Table]) -> None:
    assert chunk_table(SOURCE.chunks()[1]).equals(tables[1])


def test_chunks_cover_all_rows_once() -> None:
    chunks = HaystackSource(rows=105, rows_per_chunk=50).chunks()
    assert [(c.index, c.rows) for c in chunks] == [(0, 50), (1, 50), (2, 5)]


def test_keys_are_distinct(rows: list[dict]) -> None:
    assert len({row["key"] for row in rows}) == len(rows)


@pytest.mark.parametrize("defect", vars(PlantedShares()))
def test_a_pool_of_one_defect_carries_it_and_says_so(defect: str) -> None:
    shares = PlantedShares(**{name: 1.0 if name == defect else 0.0 for name in vars(PlantedShares())})
    chunk = HaystackSource(rows=6, side_px=64, seed=7, rows_per_chunk=6, planted=shares).chunks()[0]
    for row in chunk_table(chunk).to_pylist():
        assert json.loads(row["truth"])["defect"] == defect
        if defect == "undecodable":
            with pytest.raises((UnidentifiedImageError, OSError)):
                Image.open(io.BytesIO(row["image"])).load()
            continue
        width, height = Image.open(io.BytesIO(row["image"])).size
        assert (width, height) == (row["width_px"], row["height_px"])
        if defect == "too_small":
            assert max(width, height) <= 48
        if defect == "extreme_aspect":
            assert max(width, height) / min(width, height) > 2.4


def test_every_defect_occurs_about_as_often_as_planned() -> None:
    source = HaystackSource(rows=400, side_px=8, seed=5, rows_per_chunk=400)
    found = Counter(json.loads(t)["defect"] for t in chunk_table(source.chunks()[0])["truth"].to_pylist())
    for name, share in vars(PlantedShares()).items():
        assert found[name] / 400 == pytest.approx(share, abs=4 * np.sqrt(share / 400))


def test_an_exact_copy_has_the_bytes_and_the_caption_of_the_row_that_it_names(rows: list[dict]) -> None:
    by_picture = {row["truth"]["picture"]: row for row in rows}
    copies = [row for row in rows if "duplicate" in row["truth"]["defect"]]
    assert copies
    for row in copies:
        original = by_picture[row["truth"]["copy_of"]]
        assert original["truth"]["defect"] == ""
        assert row["caption"] == original["caption"]
        assert row["truth"]["criteria"] == original["truth"]["criteria"]
        assert (row["image"] == original["image"]) == (row["truth"]["defect"] == "exact_duplicate")


def test_only_copies_name_an_original(rows: list[dict]) -> None:
    for row in rows:
        assert bool(row["truth"]["copy_of"]) == ("duplicate" in row["truth"]["defect"])


def test_captions_state_content_of_the_haystack(rows: list[dict]) -> None:
    assert all(read_caption(row["caption"]) is not None for row in rows)


def test_photogenic_pictures_are_liked_more() -> None:
    source = HaystackSource(rows=600, side_px=8, seed=6, rows_per_chunk=600)
    table = chunk_table(source.chunks()[0])
    likes = np.log1p(np.array(table["likes"].to_pylist()))
    met = [sum(json.loads(t)["criteria"].values()) for t in table["truth"].to_pylist()]
    assert np.corrcoef(likes, met)[0, 1] > 0.5


def test_no_pool_shows_a_content_that_evaluation_asks_for_unless_it_says_so() -> None:
    clean = PlantedShares(**dict.fromkeys(vars(PlantedShares()), 0.0))
    contents = {line.removeprefix("a photo of ") for line in haystack_prompts(240)}

    def shown(source: HaystackSource) -> set[str]:
        lines = pa.concat_tables([chunk_table(chunk) for chunk in source.chunks()])["caption"].to_pylist()
        return {line.removeprefix("a photo of ").removeprefix("a picture of ") for line in lines}

    source = HaystackSource(rows=600, side_px=8, seed=3, planted=clean)
    assert not shown(source) & contents
    assert not shown(replace(source, photogenic_share=0.5)) & contents
    assert shown(replace(source, with_reserved=True)) & contents


def test_a_chunk_of_one_row_has_no_caption_to_swap_and_carries_no_defect() -> None:
    swapped = PlantedShares(**{name: float(name == "mismatched_caption") for name in vars(PlantedShares())})
    (row,) = chunk_table(HaystackSource(rows=1, side_px=8, planted=swapped).chunks()[0]).to_pylist()
    assert json.loads(row["truth"])["defect"] == ""
