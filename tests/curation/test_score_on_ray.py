"""The scores station on a real local Ray: the small CLIP untrained, easyocr as it ships."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from emu_ray.curation.classifier_scorer import Classifier
from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.on_ray import ActorPool, ScoreRecipe, _pipeline, _Work, score
from emu_ray.curation.pair_scorer import HardFloors
from emu_ray.errors import InputError, SchemaError, StationConflictError, StationMissingError
from emu_ray.ingest.pairs import Pair
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station, Store
from emu_ray.stations.slices import Slice
from tests.curation.small_pool import write_pool

pytestmark = pytest.mark.usefixtures("ray_local")

CAPTION = "a red rubber ball on the left in a meadow"


def recipe_of(root: Path, weights: Path) -> ScoreRecipe:
    return ScoreRecipe(
        root=str(root),
        clip=ClipModel(
            name="emu-demo",
            folder=str(weights / "clip"),
            aesthetic_head=str(weights / "heads" / "aesthetic.safetensors"),
            offensive_head=str(weights / "heads" / "offensive.safetensors"),
            concepts=("ball", "cube"),
        ),
        ocr=OcrSettings(canvas_px=64),
        floors=HardFloors(min_short_side_px=60, max_aspect=2.0),
        clip_pool=ActorPool(actors=1, cpus=0.5, batch_size=4),
        ocr_pool=ActorPool(actors=1, cpus=0.5, batch_size=4),
        rows_per_block=3,
        files_per_wave=1,
    )


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory,
    untrained: Path,
    noise_picture: Callable[..., bytes],
    lettered: Callable[[str], np.ndarray],
) -> tuple[Path, pa.Table]:
    """(root, scores in the order of the pairs) of one pair of each kind."""
    import io

    def png(pixels: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    images = [
        noise_picture(1),
        noise_picture(1),
        noise_picture(2)[:900],
        b"no image",
        b"",
        noise_picture(3, 40, 96),
        noise_picture(4, 200, 64),
        noise_picture(5),
        png(lettered("SALE 50")),
        png(lettered("")),
    ]
    captions = [CAPTION] * 7 + ["", CAPTION, CAPTION]
    root = tmp_path_factory.mktemp("scored")
    pairs = [Pair(image=i, caption=c, address=f"{n}") for n, (i, c) in enumerate(zip(images, captions, strict=True))]
    pool = write_pool(root, pairs)
    manifest = score(recipe_of(root, untrained))
    assert manifest.rows == len(pairs)
    table = Station(root / "scores").read_table()
    place = {key: i for i, key in enumerate(table["key"].to_pylist())}
    return root, table.take([place[k] for k in pool["key"].to_pylist()])


def test_every_pair_has_one_row_and_its_gate(scored: tuple[Path, pa.Table]) -> None:
    _, table = scored
    gates = table["gate_reason"].to_pylist()
    bad = ["undecodable"] * 3 + ["too_small", "extreme_aspect", "empty_caption"]
    assert gates == ["", "", *bad, "", ""]
    assert [bool(e) for e in table["decode_error"].to_pylist()] == [g == "undecodable" for g in gates]
    assert table["has_caption"].to_pylist() == [g != "empty_caption" for g in gates]
    assert table.schema.names[: len(SCHEMAS["scores"])] == SCHEMAS["scores"].names


def test_a_measured_pair_has_all_scores_in_their_ranges_and_a_gated_one_none(scored: tuple[Path, pa.Table]) -> None:
    _, table = scored
    columns = ("offensive", "aesthetic", "clip_similarity", "embedding", "concept", "phash", "text_words", "text_area")
    for row in table.to_pylist():
        assert all((row[c] is None) == (row["gate_reason"] != "") for c in columns), row
        if row["gate_reason"] == "":
            assert abs(np.linalg.norm(row["embedding"]) - 1) < 1e-5
            assert 0 <= row["offensive"] <= 1 and 0 <= row["aesthetic"] <= 10 and -1 <= row["clip_similarity"] <= 1
            assert row["concept"] in ("ball", "cube") and len(row["phash"]) == 16


def test_equal_pictures_have_equal_scores_and_digests(scored: tuple[Path, pa.Table]) -> None:
    first, second = scored[1].slice(0, 2).to_pylist()
    for column in ("phash", "image_digest", "text_area"):
        assert first[column] == second[column]
    np.testing.assert_allclose(first["embedding"], second["embedding"], atol=1e-5)


def test_overlaid_words_are_counted_and_a_plain_picture_has_none(scored: tuple[Path, pa.Table]) -> None:
    text, plain = scored[1].slice(8, 2).to_pylist()
    assert text["text_words"] >= 1 and text["text_area"] > 0.05
    assert (plain["text_words"], plain["text_area"]) == (0, 0.0)


def test_waves_are_sorted_by_key_and_a_second_run_does_nothing(
    scored: tuple[Path, pa.Table], untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = scored
    for i in range(2):
        keys = Station(root / "scores").wave(i).read_table(["key"])["key"].to_pylist()
        assert keys == sorted(keys) and len(keys) == 5
    before = Station(root / "scores").manifest()
    assert score(recipe_of(root, untrained)) == before
    assert "nothing to do" in capsys.readouterr().out


def test_other_floors_over_finished_scores_are_a_conflict(scored: tuple[Path, pa.Table], untrained: Path) -> None:
    other = dataclasses.replace(recipe_of(scored[0], untrained), floors=HardFloors(min_short_side_px=61))
    with pytest.raises(StationConflictError, match=r"floors.min_short_side_px was 60 and is 61"):
        score(other)


def test_the_pool_is_checked_before_any_weight_is_loaded(tmp_path: Path, untrained: Path) -> None:
    recipe = recipe_of(tmp_path, untrained)
    with pytest.raises(StationMissingError, match=r"jobs\.ingest"):
        score(recipe)
    pool = Station(tmp_path / "pool")
    pool.begin("x", "{}", "pool", {})
    pool.write_table("part-0.parquet", pa.table({"key": pa.array([1], pa.int64())}))
    with pytest.raises(SchemaError, match="expected column 'image'"):
        pool.finish(rows=1)
        score(recipe)


def test_missing_weights_are_one_sentence_on_the_driver(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes]
) -> None:
    write_pool(tmp_path, [Pair(image=noise_picture(), caption="a", address="0")], files=1)
    recipe = recipe_of(tmp_path, untrained)
    absent = dataclasses.replace(recipe, clip=dataclasses.replace(recipe.clip, folder="/nowhere"))
    with pytest.raises(InputError, match="the file of clip is missing: expected it at /nowhere"):
        score(absent)


def test_every_pool_may_ask_for_gpus(tmp_path: Path, untrained: Path) -> None:
    pool = ActorPool(actors=1, max_actors=2, gpus=0.2)
    recipe = dataclasses.replace(
        recipe_of(tmp_path, untrained),
        clip_pool=pool,
        classifier_pool=pool,
        ocr_pool=pool,
        offensive_classifier=Classifier(model="any", label="nsfw"),
    )
    work = _Work(recipe, Station(tmp_path / "pool"), Store(str(tmp_path / "attempts")), None)
    planned = _pipeline(work, [Slice("a.parquet", "a.parquet", 0, 0, 3)])  # Ray Data checks here what it is asked for
    assert isinstance(planned, ray.data.Dataset)
