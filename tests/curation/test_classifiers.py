"""Image classifiers as scorers: alone, in the actor's class, and in a whole run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pytest
import torch

from emu_ray.curation import classifier_scorer
from emu_ray.curation.classifier_scorer import Classifier, ClassifierScorer, check_classifier
from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.on_ray import ScoreRecipe, score
from emu_ray.curation.pair_scorer import ActorPool, HardFloors, LabelScorer, PairScorer
from emu_ray.errors import InputError, StationConflictError
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.pictures.decode import decode
from emu_ray.stations import Station
from tests.curation.small_pool import write_pool

SIDE_PX = 96


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the layout of Falconsai/nsfw_image_detection (a ViT with two labels), very small."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1}
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_classifier_gives_the_probability_of_its_label(vit: Path, lettered: Callable[[str], np.ndarray]) -> None:
    pictures = [np.array(p) for p in (lettered("A"), lettered("")[:50], lettered("B")[:, :40])]
    nsfw = ClassifierScorer(Classifier(model=str(vit), label="nsfw")).measure(pictures)
    normal = ClassifierScorer(Classifier(model=str(vit), label="normal")).measure(pictures)
    np.testing.assert_allclose(nsfw + normal, 1, atol=1e-5)
    assert len(set(nsfw.tolist())) == 3


def test_an_unknown_label_or_classifier_is_one_sentence_on_the_driver(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tells apart normal, nsfw: 'porn' is none of them"):
        check_classifier(Classifier(model=str(vit), label="porn"))
    with pytest.raises(InputError, match="can't find the classifier"):
        check_classifier(Classifier(model=str(tmp_path), label="nsfw"))


def test_an_error_without_a_message_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(classifier_scorer.AutoConfig, "from_pretrained", fail)
    with pytest.raises(InputError, match="can't find the classifier acme/vit: OSError"):
        check_classifier(Classifier(model="acme/vit", label="nsfw"))


def test_a_branch_on_the_hub_becomes_the_commit_that_it_is_now(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, as the hub's cache of this machine tells it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(vit, tmp_path / "models--acme--vit" / "snapshots" / commit)
    (tmp_path / "models--acme--vit" / "refs").mkdir()
    (tmp_path / "models--acme--vit" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = Classifier(model="acme/vit", label="nsfw").resolved()
    assert found.revision == commit == check_classifier(found)
    assert Classifier(model=str(vit), label="nsfw").resolved().revision is None
    with pytest.raises(InputError, match="can't find the classifier acme/absent"):
        Classifier(model="acme/absent", label="nsfw").resolved()


def test_changed_files_of_a_classifier_change_what_names_it(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    copy = Classifier(model=str(tmp_path / "vit"), label="nsfw")
    assert check_classifier(copy) == check_classifier(Classifier(model=str(vit), label="nsfw"))
    weights = tmp_path / "vit" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert check_classifier(copy) != check_classifier(Classifier(model=str(vit), label="nsfw"))


@pytest.fixture(scope="module")
def images(noise_picture: Callable[..., bytes]) -> list[bytes]:
    return [noise_picture(n) for n in range(6)]


@pytest.fixture(scope="module")
def probabilities(vit: Path, images: list[bytes]) -> np.ndarray:
    """(6,) of the label "nsfw", as ClassifierScorer gives them."""
    pixels = [decode(image, side_px=SIDE_PX).pixels for image in images]
    return ClassifierScorer(Classifier(model=str(vit), label="nsfw")).measure(pixels)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scored(untrained: Path, images: list[bytes]) -> pa.Table:
    """What PairScorer gives for the six pictures and an empty caption."""
    pairs = [Pair(image=image, caption="a ball", address=str(n)) for n, image in enumerate(images)]
    pairs.append(Pair(image=images[0], caption="", address="6"))
    clip = ClipModel(name="emu-demo", folder=str(untrained / "clip"))
    return PairScorer(HardFloors(), clip)(pa.concat_tables(pool_tables(pairs, Caps())))


def label_scorer(vit: Path, column: str, floors: HardFloors) -> LabelScorer:
    return LabelScorer(Classifier(model=str(vit), label="nsfw"), column, ActorPool(batch_size=4), floors, SIDE_PX)


@pytest.mark.parametrize("column", ["offensive", "watermark"])
def test_a_label_fills_its_column_of_the_rows_that_no_gate_stopped(
    vit: Path, scored: pa.Table, probabilities: np.ndarray, column: str
) -> None:
    found = label_scorer(vit, column, HardFloors())(scored)
    np.testing.assert_allclose(found[column].to_pylist()[:6], probabilities, rtol=1e-4)
    assert found[column].to_pylist()[6] is None
    assert found["gate_reason"].to_pylist() == [""] * 6 + ["empty_caption"]
    assert found.drop_columns([column, "seconds_classifier"]) == scored.drop_columns([column, "seconds_classifier"])
    assert all(seconds > 0 for seconds in found["seconds_classifier"].to_pylist())


def test_a_probability_over_the_floor_of_offensive_content_is_a_gate(
    vit: Path, scored: pa.Table, probabilities: np.ndarray
) -> None:
    floors = HardFloors(max_offensive=float(np.median(probabilities)))
    expected = ["offensive" if p > floors.max_offensive else "" for p in probabilities]
    assert set(expected) == {"offensive", ""}
    found = label_scorer(vit, "offensive", floors)(scored)
    assert found["gate_reason"].to_pylist() == [*expected, "empty_caption"]
    assert label_scorer(vit, "watermark", floors)(scored)["gate_reason"].to_pylist() == [""] * 6 + ["empty_caption"]


def test_a_picture_that_fails_in_the_classifier_gets_a_reason(vit: Path, scored: pa.Table) -> None:
    images = [b"gone", *scored["image"].to_pylist()[1:]]
    broken = scored.set_column(scored.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
    scorer = label_scorer(vit, "offensive", HardFloors())
    found = scorer(broken)
    assert found["gate_reason"].to_pylist() == ["scorer_failed", *[""] * 5, "empty_caption"]
    assert found["offensive"].to_pylist()[0] is None
    torch.nn.init.constant_(scorer.classifier.model.classifier.bias, torch.nan)
    found = scorer(scored)
    assert found["gate_reason"].to_pylist() == ["scorer_failed"] * 6 + ["empty_caption"]
    assert found["offensive"].null_count == 7


@pytest.mark.slow
def test_both_classifiers_score_a_pool_and_changed_weights_are_another_recipe(
    vit: Path, untrained: Path, images: list[bytes], probabilities: np.ndarray, tmp_path: Path, ray_local: None
) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    pool = write_pool(tmp_path, [Pair(image=i, caption="a ball", address=str(n)) for n, i in enumerate(images)])
    bound = float(np.median(probabilities))
    small = ActorPool(actors=1, cpus=0.25, batch_size=4)
    recipe = ScoreRecipe(
        root=str(tmp_path),
        clip=ClipModel(name="emu-demo", folder=str(untrained / "clip")),
        ocr=OcrSettings(canvas_px=64),
        floors=HardFloors(max_offensive=bound),
        offensive_classifier=Classifier(model=str(tmp_path / "vit"), label="nsfw"),
        watermark_classifier=Classifier(model=str(tmp_path / "vit"), label="normal"),
        side_px=SIDE_PX,
        clip_pool=small,
        classifier_pool=small,
        ocr_pool=small,
        rows_per_block=3,
    )
    manifest = score(recipe)
    stopped = int((probabilities > bound).sum())
    assert manifest.counts == {"rows": 6, "measured": 6 - stopped, "gate_offensive": stopped}
    assert manifest.extra["stages"]["classifier"]["seconds"] > 0
    rows = {row["key"]: row for row in Station(tmp_path / "scores").read_table().to_pylist()}
    for key, probability in zip(pool["key"].to_pylist(), probabilities.tolist(), strict=True):
        row, is_out = rows[key], probability > bound
        assert row["offensive"] == pytest.approx(probability, rel=1e-4)
        assert row["gate_reason"] == ("offensive" if is_out else "")
        assert (row["watermark"] is None) == (row["text_area"] is None) == is_out
        assert is_out or row["watermark"] == pytest.approx(1 - probability, rel=1e-4)
    weights = tmp_path / "vit" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(StationConflictError, match="input 'offensive_classifier' was"):
        score(dataclasses.replace(recipe))
