"""The page of a selection: self-contained, escaped, with pictures around the bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from emu_ray.curation.costs import Prices
from emu_ray.curation.funnel_report import read_examples, render_funnel, write_report
from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.row_rules import RowFacts
from emu_ray.curation.score_charts import ScoreCharts
from emu_ray.curation.selecting import SelectRecipe, select
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Station


@pytest.fixture
def root(tmp_path: Path, make_scores: Callable[..., pa.Table], noise_picture: Callable[..., bytes]) -> Path:
    """ROOT with pool, scores and selection of 12 pairs; every other one is below the bound of the aesthetic score."""
    pairs = [Pair(image=noise_picture(n), caption=f"<b>picture {n}</b>", address=str(n)) for n in range(12)]
    pool_table = pa.concat_tables(pool_tables(pairs, Caps()))
    keys = pool_table["key"].to_pylist()
    rows = [{"key": k, "aesthetic": 4.0 + (n % 2) * 3, "concept": "a & b"} for n, k in enumerate(keys)]
    scores_table = make_scores(*rows)
    for name, table in (("pool", pool_table), ("scores", scores_table)):
        station = Station(tmp_path / name)
        station.begin("r", "{}", name, {})
        station.write_table("part-0.parquet", table)
        stages = {"decode": {"rows": 12, "seconds": 6.0, "cpus": 1.0, "gpus": 0.5}}
        station.finish(rows=12, extra={"stages": stages} if name == "scores" else {})
    policy = SelectionPolicy(min_short_side_px=16, duplicates=None)
    select(SelectRecipe(root=str(tmp_path), policy=policy))
    return tmp_path


def test_the_page_needs_nothing_beside_itself_and_shows_both_sides_of_a_bound(root: Path) -> None:
    where = write_report(str(root), Prices())
    page = Path(where).read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it loads nothing"
    assert len(set(re.findall('data:image/jpeg;base64,[^"]+', page))) == 12
    assert "<b>picture" not in page and "&lt;b&gt;picture" in page
    assert "low_aesthetic" in page and "aesthetic: at least 5" in page and "a &amp; b" in page
    assert "6 of 12 pairs kept" in page and "GPU-seconds" in page
    assert page.count("<svg") >= 3


def test_a_page_without_pool_and_costs_has_no_pictures(root: Path) -> None:
    manifest = Station(root / "selection").require("selection")
    page = render_funnel(manifest, {}, {}, Prices())
    assert "data:image" not in page and "GPU-seconds" not in page and "low_aesthetic" in page


def test_only_the_wanted_pictures_are_read(root: Path) -> None:
    keys = Station(root / "pool").read_table(["key"])["key"].to_pylist()
    found = read_examples(Station(root / "pool"), {keys[3], keys[11], 5})
    assert set(found) == {keys[3], keys[11]} and found[keys[3]].caption == "<b>picture 3</b>"


def test_the_same_selection_gives_the_same_page(root: Path) -> None:
    pages = [Path(write_report(str(root), Prices())).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("row", "policy", "column"),
    [
        ({"text_words": 2, "text_area": 0.9}, {}, "text_words"),
        ({"text_words": 5, "text_area": 0.9}, {}, "text_words"),
        ({"photography": 0.6, "photo_exposure": 0.1}, {"photo_bounds": {"exposure": (0.3, None)}}, "photography"),
        ({"photo_exposure": 0.9}, {"photo_bounds": {"exposure": (0.3, 0.8)}}, "photo_exposure"),
        ({"offensive": 0.4, "gate_reason": "offensive"}, {}, "offensive"),
    ],
)
def test_around_a_bound_stand_only_pairs_that_every_other_bound_keeps(
    make_scores: Callable[..., pa.Table], row: dict, policy: dict, column: str
) -> None:
    asked = SelectionPolicy(min_short_side_px=64, min_photography=0.5, **policy)
    scores = make_scores(row, {"photography": 0.9, "photo_exposure": 0.5})
    charts = ScoreCharts(scores.column_names, asked, {})
    charts.add(scores, RowFacts.of(scores, asked))
    walls = {(e["score"], e["side"]): e for e in charts.examples()}
    sides = ["most"] if column in ("text_words", "offensive") else ["least"]
    assert all(0 not in walls[column, side][where] for side in sides for where in ("below", "above"))
    assert all(any(1 in wall[where] for where in ("below", "above")) for wall in walls.values())
