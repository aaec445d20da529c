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
