"""The stations selection and chosen: what the jobs read, write, count and refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from emu_ray.curation.choosing import ChooseRecipe, choose, simulated
from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.selecting import SelectRecipe, audit_root, select
from emu_ray.errors import InputError, StationConflictError, StationMissingError
from emu_ray.stations import Station

Make = Callable[..., pa.Table]
POLICY = SelectionPolicy(min_short_side_px=64)


def truth(photogenic: bool, defect: str = "", picture: str = "p") -> str:
    return json.dumps({"defect": defect, "photogenic": photogenic, "picture": picture, "copy_of": ""})


@pytest.fixture
def root(tmp_path: Path, make_scores: Make, picture: Callable[..., bytes]) -> Path:
    """ROOT with a pool of five pictures with truth and their scores; the last one is too small, and no picture at all."""
    scores = make_scores(
        {"aesthetic": 6.0},
        {"aesthetic": 9.0},
        {"aesthetic": 8.0, "offensive": 0.9},
        {"aesthetic": 7.0},
        {"width_px": 9},
    )
    pool = pa.table(
        {
            "key": pa.array(range(5), pa.int64()),
            "image": pa.array([*(picture(i) for i in range(4)), b"404"], pa.binary()),
            "caption": [f"caption {i}" for i in range(5)],
            "width_px": pa.array([100] * 5, pa.int32()),
            "height_px": pa.array([100] * 5, pa.int32()),
            "likes": pa.array([0] * 5, pa.int64()),
            "source": [""] * 5,
            "truth": [truth(i != 3, "offensive" if i == 2 else "", f"p{i}") for i in range(5)],
        }
    )
    for name, table in (("pool", pool), ("scores", scores)):
        station = Station(tmp_path / name)
        station.begin("recipe", "{}", name, {})
        station.write_table("part-00000.parquet", table.slice(0, 3))
        station.write_table("part-00001.parquet", table.slice(3))
        station.finish(rows=5)
    return tmp_path


def selected(root: Path) -> SelectRecipe:
    recipe = SelectRecipe(root=str(root), policy=POLICY)
    select(recipe)
    return recipe


def test_a_selection_has_a_row_a_pair_and_its_counts_add_up(root: Path) -> None:
    recipe = selected(root)
    manifest = select(recipe)
    rows = Station(root / "selection").read_table().to_pylist()
    assert [r["reject_reason"] for r in rows] == ["", "", "offensive", "", "too_small"]
    assert [r["rank"] for r in rows] == [2, 0, None, 1, None]
    reasons = {n: c for n, c in manifest.counts.items() if n not in ("rows", "kept")}
    assert manifest.counts["kept"] + sum(reasons.values()) == manifest.counts["rows"] == 5
    assert next(s["reason"] for s in manifest.extra["funnel"]) == "undecodable"


def test_another_policy_over_a_finished_selection_is_a_conflict(root: Path) -> None:
    recipe = selected(root)
    other = dataclasses.replace(recipe, policy=dataclasses.replace(POLICY, min_aesthetic=6.0))
    with pytest.raises(StationConflictError, match=r"policy.min_aesthetic was 5.0 and is 6.0"):
        select(other)


def test_a_policy_that_keeps_nothing_says_which_bound(root: Path) -> None:
    with pytest.raises(InputError, match="keeps none of the 5 pairs .* 'low_aesthetic'"):
        select(SelectRecipe(root=str(root), policy=dataclasses.replace(POLICY, min_aesthetic=9.5)))


def test_selecting_without_scores_names_the_job(tmp_path: Path) -> None:
    with pytest.raises(StationMissingError, match=r"jobs\.score"):
        select(SelectRecipe(root=str(tmp_path)))


def test_the_filters_of_a_root_are_audited_by_its_truth(root: Path) -> None:
    selected(root)
    found = audit_root(str(root))
    assert found["offensive"]["precision"] == found["offensive"]["recall"] == 1.0
    assert found["too_small"]["precision"] == 0.0


def chosen_by_csv(root: Path, text: str) -> list[dict[str, object]]:
    (root / "mine.csv").write_text(text)
    choose(ChooseRecipe(root=str(root), annotator="csv", choices=str(root / "mine.csv")))
    return Station(root / "chosen").read_table().to_pylist()


def test_people_write_captions_and_their_order_is_kept(root: Path, picture: Callable[..., bytes]) -> None:
    selected(root)
    rows = chosen_by_csv(root, 'key,caption,annotator\n3,"a ball, red",ann\n0, by hand ,\n')
    assert [(r["key"], r["caption"], r["annotator"]) for r in rows] == [
        (3, "a ball, red", "ann"),
        (0, "by hand", "csv"),
    ]
    assert [r["image"] for r in rows] == [picture(3), picture(0)] and rows[0]["votes"] is None
    assert Station(root / "chosen").require("chosen").extra == {"annotator": "csv"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key\n1\n", "expected a column 'caption', found key"),
        ("", "expected a column 'key', found none"),
        ("key,caption\n77,a\n", "row 2: the key 77 is not in the selection"),
        ("key,caption\n1,a\n1,b\n", "row 3: the key 1 stands there a second time"),
        ("key,caption\none,a\n", "row 2: expected a whole number as key, found 'one'"),
        ("key,caption\n1, \n", "row 2: the caption of key 1 is empty"),
        ("key,caption\n", "took none of 3 candidates"),
        ("key,caption\n4,a\n", "picture of the chosen key 4 can't be decoded"),
    ],
)
def test_a_csv_with_a_mistake_is_one_sentence(root: Path, text: str, said: str) -> None:
    selected(root)
    with pytest.raises(InputError, match=said):
        chosen_by_csv(root, text)
    assert not Station(root / "chosen").is_finished()


def test_a_missing_csv_is_one_sentence(root: Path) -> None:
    selected(root)
    with pytest.raises(InputError, match="can't read the choices /nowhere.csv"):
        choose(ChooseRecipe(root=str(root), choices="/nowhere.csv"))
    with pytest.raises(InputError, match="needs --choices"):
        choose(ChooseRecipe(root=str(root)))


def test_an_annotator_without_error_takes_exactly_the_photogenic_in_rank_order(root: Path) -> None:
    selected(root)
    manifest = choose(ChooseRecipe(root=str(root), annotator="simulated", error_rate=0.0, seed=1))
    rows = Station(root / "chosen").read_table().to_pylist()
    assert [r["key"] for r in rows] == [1, 0] and rows[0]["caption"] == "caption 1"
    assert manifest.extra == {"annotator": "simulated", "error_rate": 0.0, "seed": 1}


def test_take_top_keeps_everything_selected_up_to_max_images(root: Path) -> None:
    selected(root)
    choose(ChooseRecipe(root=str(root), annotator="take_top", max_images=2))
    assert Station(root / "chosen").read_table(["key"])["key"].to_pylist() == [1, 3]


def test_the_simulated_annotator_errs_at_its_rate_and_independently_of_company() -> None:
    keys = list(range(-2000, 2000))
    facts = {key: truth(key % 2 == 0) for key in keys}
    took = {c.key for c in simulated(keys, facts, 0.1, seed=3)}
    wrong = sum((key in took) != (key % 2 == 0) for key in keys) / len(keys)
    assert abs(wrong - 0.1) < 0.015
    assert {c.key for c in simulated(keys[::-7], facts, 0.1, seed=3)} == took & set(keys[::-7])


def test_a_person_does_not_take_a_picture_with_text_or_badge() -> None:
    facts = {1: truth(True, "overlaid_text"), 2: truth(True, "offensive"), 3: truth(True, "near_duplicate")}
    assert [c.key for c in simulated([1, 2, 3], facts, 0.0, seed=0)] == [3]
