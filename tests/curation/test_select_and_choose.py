"""The stations selection and chosen: what the jobs read, write, count and refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from emu_ray.config import fingerprint, from_json, parse, to_json
from emu_ray.curation import selecting
from emu_ray.curation.choosing import ChooseRecipe, choose, simulated
from emu_ray.curation.copies import one_after_another
from emu_ray.curation.deciding import decide
from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.row_rules import RowFacts
from emu_ray.curation.selecting import Judged, SelectRecipe, audit_root, select, selection_tables
from emu_ray.errors import InputError, StationConflictError, StationError, StationMissingError
from emu_ray.stations import Station
from jobs import select as job

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


def scores_station(folder: Path, table: pa.Table, rows_per_part: int, rows_per_group: int = 2) -> Station:
    station = Station(folder / "scores")
    station.begin("recipe", "{}", "scores", {})
    for index, start in enumerate(range(0, len(table), rows_per_part)):
        with station.store.writing(f"part-{index:05d}.parquet") as sink:
            pq.write_table(table.slice(start, rows_per_part), sink, row_group_size=rows_per_group)
    station.finish(rows=len(table))
    return station


def many(make_scores: Make, count: int) -> pa.Table:
    """Pairs of which every third has a copy further on, in random order of keys, some failing a bound."""
    rng = np.random.default_rng(0)
    keys = rng.permutation(count) - count // 2
    vectors = rng.normal(size=(count, 16))
    rows = []
    for i in range(count):
        like = i - count // 3 if i >= count - count // 3 else i
        flips = 0b11 if i != like else 0
        vector = vectors[like] / np.linalg.norm(vectors[like])
        rows.append(
            {
                "key": int(keys[i]),
                "phash": f"{(like * 0x9E3779B97F4A7C15) % 2**64 ^ flips:016x}",
                "embedding": vector.tolist(),
                "aesthetic": float(rng.integers(3, 10)),
                "offensive": float(rng.random()),
                "likes": int(rng.integers(0, 50)),
                "concept": "abc"[int(rng.integers(0, 3))],
            }
        )
    return make_scores(*rows)


STRICT = dataclasses.replace(POLICY, max_offensive=0.8, likes_weight=0.3, concept_quotas={"a": 5}, max_images=15)


@pytest.mark.parametrize("embedding_bytes", [0, 1 << 20])
def test_a_pool_read_in_pieces_is_judged_like_a_table(
    tmp_path: Path, make_scores: Make, embedding_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "EMBEDDING_BYTES", embedding_bytes)
    monkeypatch.setattr(selecting.row_batches, "__defaults__", (7,))
    table = many(make_scores, 120)
    scores_station(tmp_path, table, rows_per_part=50, rows_per_group=9)
    select(SelectRecipe(root=str(tmp_path), policy=STRICT))
    decision = decide(table, STRICT)
    rows = Station(tmp_path / "selection").read_table().to_pylist()
    expected = {
        key: (str(reason), rank)
        for key, reason, rank in zip(table["key"].to_pylist(), decision.reasons, decision.rank, strict=True)
    }
    assert [r["key"] for r in rows] == sorted(expected)
    assert {r["key"]: r["reject_reason"] for r in rows} == {key: reason for key, (reason, _) in expected.items()}
    assert all(r["rank"] == expected[r["key"]][1] for r in rows if r["reject_reason"] == "")
    assert {"", "duplicate", "offensive", "low_aesthetic", "over_quota", "not_in_top_k"} == {
        r["reject_reason"] for r in rows
    }


def test_a_duplicate_names_the_better_copy_that_is_kept_instead(tmp_path: Path, make_scores: Make) -> None:
    same = {"phash": "00ff00ff00ff00ff", "embedding": [1.0] + [0.0] * 15}
    scores_station(tmp_path, make_scores({**same, "key": 50}, {"key": 7}, {**same, "key": -4, "aesthetic": 9.0}), 1)
    manifest = select(SelectRecipe(root=str(tmp_path), policy=POLICY))
    rows = Station(tmp_path / "selection").read_table().to_pylist()
    assert [(r["key"], r["reject_reason"], r["duplicate_of"]) for r in rows] == [
        (-4, "", None), (7, "", None), (50, "duplicate", -4),
    ]  # fmt: skip
    assert manifest.extra["copies"]["pairs_alike"] == 1 and manifest.extra["copies"]["long_runs"] == 0


def test_a_selection_is_written_in_parts_sorted_by_key(tmp_path: Path, make_scores: Make) -> None:
    table = many(make_scores, 30)
    facts, decision = RowFacts.of(table, STRICT), decide(table, STRICT)
    parts = list(selection_tables(Judged(facts, decision, {}), rows_per_part=12))
    assert [len(p) for p in parts] == [12, 12, 6]
    keys = pa.concat_tables(parts)["key"].to_pylist()
    assert keys == sorted(table["key"].to_pylist())


def test_the_order_of_the_pieces_and_ray_change_no_byte(
    tmp_path: Path, make_scores: Make, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "WORTH_A_CLUSTER_ROWS", 10)
    table, found = many(make_scores, 120), []
    for workers in (1, 8):
        folder = tmp_path / str(workers)
        scores_station(folder, table, rows_per_part=60)
        recipe = SelectRecipe(root=str(folder), policy=STRICT, workers=workers)
        manifest = select(recipe, job.runner(recipe))
        found.append(
            (
                Station(folder / "selection").read_table().to_pylist(),
                manifest.counts,
                manifest.extra,
                manifest.fingerprint,
            )
        )
    assert found[0] == found[1] and found[0][1]["duplicate"] > 5


def test_a_small_pool_or_one_worker_needs_no_ray(root: Path) -> None:
    assert job.runner(SelectRecipe(root=str(root), workers=8)) is one_after_another
    assert job.runner(SelectRecipe(root=str(root / "nothing"), workers=8)) is one_after_another


def test_histograms_count_every_value_and_tell_the_bounds(root: Path) -> None:
    charts = select(SelectRecipe(root=str(root), policy=POLICY)).extra["histograms"]
    aesthetic = charts["aesthetic"]
    assert len(aesthetic["edges"]) == 51 and len(aesthetic["counts"]) == 50
    assert (aesthetic["edges"][0], aesthetic["edges"][-1]) == (6.0, 9.0)
    assert sum(aesthetic["counts"]) == 5 and aesthetic["counts"][0] == aesthetic["counts"][-1] == 1
    assert (aesthetic["least"], aesthetic["most"], aesthetic["missing"]) == (5.0, None, 0)
    assert sum(charts["offensive"]["counts"][:49]) == 4 and charts["offensive"]["most"] == 0.5


def test_examples_are_the_nearest_to_a_bound_among_what_other_rules_keep(tmp_path: Path, make_scores: Make) -> None:
    rng = np.random.default_rng(1)
    values = (rng.permutation(200) / 20).tolist()
    rows = [
        {"key": i, "aesthetic": v, **({"offensive": 0.9} if round(20 * v) % 3 == 0 else {})}
        for i, v in enumerate(values)
    ]
    scores_station(tmp_path, make_scores(*rows), rows_per_part=37)
    examples = select(SelectRecipe(root=str(tmp_path), policy=dataclasses.replace(POLICY, duplicates=None))).extra[
        "examples"
    ]
    found = next(e for e in examples if e["score"] == "aesthetic")
    others = [i for i in range(200) if round(20 * values[i]) % 3]
    assert 5.0 in [values[i] for i in others]
    below = sorted((i for i in others if values[i] < 5.0), key=lambda i: 5.0 - values[i])[:8]
    above = sorted((i for i in others if values[i] >= 5.0), key=lambda i: values[i])[:8]
    assert (found["side"], found["bound"], found["below"], found["above"]) == ("least", 5.0, below, above)
    assert {e["score"] for e in examples} >= {"offensive", "text_words", "text_area", "clip_similarity"}


def test_concepts_stand_in_the_manifest_with_and_without_quotas(root: Path) -> None:
    plain = select(SelectRecipe(root=str(root), policy=POLICY)).extra["concepts"]
    assert plain == [{"concept": "ball", "candidates": 3, "kept": 3, "wanted": None, "shortfall": None}]
    shutil.rmtree(root / "selection")
    asked = dataclasses.replace(POLICY, concept_quotas={"ball": 2, "cube": 2})
    concepts = {c["concept"]: c for c in select(SelectRecipe(root=str(root), policy=asked)).extra["concepts"]}
    assert (concepts["ball"]["kept"], concepts["ball"]["shortfall"]) == (2, 0)
    assert (concepts["cube"]["candidates"], concepts["cube"]["shortfall"]) == (0, 2)


def test_quotas_and_bounds_are_given_on_the_command_line() -> None:
    argv = [
        "demo",
        "--policy.concept-quotas",
        "in a meadow",
        "3",
        "*",
        "1",
        "--policy.photo-bounds",
        "exposure",
        "0.1",
        "None",
    ]
    recipe = parse("select", "", job.RECIPES, argv)
    assert recipe.policy.concept_quotas == {"in a meadow": 3, "*": 1}
    assert recipe.policy.photo_bounds == {"exposure": (0.1, None)}
    again = from_json(SelectRecipe, to_json(recipe))
    assert again == recipe and fingerprint(again) == fingerprint(dataclasses.replace(recipe, workers=8))


def test_another_policy_over_a_finished_selection_is_a_conflict(root: Path) -> None:
    recipe = selected(root)
    other = dataclasses.replace(recipe, policy=dataclasses.replace(POLICY, min_aesthetic=6.0))
    with pytest.raises(StationConflictError, match=r"policy.min_aesthetic was 5.0 and is 6.0"):
        select(other)


def test_replace_selects_again_with_other_bounds_and_removes_the_old_selection(root: Path) -> None:
    recipe = selected(root)
    other = dataclasses.replace(recipe, policy=dataclasses.replace(POLICY, min_aesthetic=6.5), replace=True)
    assert select(other).counts["kept"] == 2 and select(other).counts["low_aesthetic"] == 1
    assert Station(root / "selection").read_table()["reject_reason"][0].as_py() == "low_aesthetic"
    (root / "other").mkdir()
    (root / "other" / "scores").symlink_to(root / "scores")
    (root / "other" / "selection").mkdir()
    (root / "other" / "selection" / "mine.txt").write_text("a note")
    with pytest.raises(StationError, match="emu_ray did not write"):
        select(dataclasses.replace(other, root=str(root / "other")))
    assert (root / "other" / "selection" / "mine.txt").exists()


def test_a_head_rates_the_stored_embeddings_anew(tmp_path: Path, make_scores: Make) -> None:
    from emu_ray.curation.heads import LinearHead

    head = LinearHead(16, "score")
    head.weight.data[0, :3] = torch.tensor([2.0, 9.0, 6.0])
    head.save(tmp_path / "head.safetensors")
    rows = [{"aesthetic": None}, {"aesthetic": 1.0}, {}, {"embedding": None, "gate_reason": "offensive"}]
    scores_station(tmp_path, make_scores(*rows), rows_per_part=3)
    recipe = SelectRecipe(root=str(tmp_path), policy=POLICY, aesthetic_head=str(tmp_path / "head.safetensors"))
    manifest = select(recipe)
    found = Station(tmp_path / "selection").read_table().to_pylist()
    assert [(r["reject_reason"], r["rank"]) for r in found] == [
        ("low_aesthetic", None), ("", 0), ("", 1), ("offensive", None),
    ]  # fmt: skip
    assert "aesthetic_head" in manifest.inputs and manifest.extra["histograms"]["aesthetic"]["missing"] == 1
    LinearHead(8, "score").save(tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="head is for embeddings of 8 numbers, .* have 16"):
        select(dataclasses.replace(recipe, replace=True))


def test_without_any_aesthetic_score_photography_and_likes_rank(tmp_path: Path, make_scores: Make) -> None:
    rows = [
        {"aesthetic": None, "photography": 0.5, "likes": 0, "width_px": 150},
        {"aesthetic": None, "photography": 0.6, "likes": 0},
        {"aesthetic": None, "photography": 0.5, "likes": 100_000},
    ]
    policy = dataclasses.replace(POLICY, min_aesthetic=None, likes_weight=0.2)
    scores_station(tmp_path, make_scores(*rows), rows_per_part=2)
    select(SelectRecipe(root=str(tmp_path), policy=policy))
    assert Station(tmp_path / "selection").read_table()["rank"].to_pylist() == [2, 1, 0]
    assert decide(make_scores(*rows), policy).rank.tolist() == [2, 1, 0]


def test_likes_never_keep_a_picture_below_the_bound_instead_of_its_copy(make_scores: Make) -> None:
    same = {"phash": "00ff00ff00ff00ff", "embedding": [1.0] + [0.0] * 15}
    scores = make_scores({**same, "aesthetic": 4.9, "likes": 1_000_000}, {**same, "aesthetic": 5.1})
    decision = decide(scores, dataclasses.replace(POLICY, likes_weight=0.1))
    assert decision.reasons.tolist() == ["duplicate", ""]


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


def test_truth_meets_scores_by_key_not_by_place(
    tmp_path: Path, make_scores: Make, picture: Callable[..., bytes]
) -> None:
    rows = [{"key": key, "offensive": 0.9 if key == 1 else 0.0} for key in (1, 3, 4, 0, 2)]
    scores_station(tmp_path, make_scores(*rows), rows_per_part=2)
    columns = {
        "key": [2, 0, 1, 4, 3],
        "truth": [truth(True, "offensive" if k == 1 else "", f"p{k}") for k in (2, 0, 1, 4, 3)],
    }
    pool = make_scores(*({"key": k} for k in columns["key"])).select(["width_px", "height_px", "likes"])
    for name, values in {**columns, "image": [b""] * 5, "caption": [""] * 5, "source": [""] * 5}.items():
        kind = {"key": pa.int64(), "image": pa.binary()}.get(name, pa.string())
        pool = pool.append_column(name, pa.array(values, kind))
    station = Station(tmp_path / "pool")
    station.begin("recipe", "{}", "pool", {})
    station.write_table("part-00000.parquet", pool)
    station.finish()
    selected(tmp_path)
    found = audit_root(str(tmp_path))["offensive"]
    assert found["precision"] == found["recall"] == 1.0


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
