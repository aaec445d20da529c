"""CLIP and OCR outside Ray."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from emu_ray.curation.clip_scorer import ClipModel, ClipScorer, check
from emu_ray.curation.heads import LinearHead, load_head
from emu_ray.curation.ocr_scorer import OcrScorer, OcrSettings, _canvas
from emu_ray.curation.pair_scorer import ActorPool, HardFloors, PairScorer, TextScorer
from emu_ray.errors import InputError, RecipeError
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Store
from tests.s3_server import S3Server


def clip_of(weights: Path, **changes: object) -> ClipModel:
    return ClipModel(name="emu-demo", folder=str(weights / "clip"), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reader() -> OcrScorer:
    torch.set_num_threads(1)
    return OcrScorer(OcrSettings(canvas_px=64))


def test_the_embedding_is_open_clips_own_and_similarity_its_cosine(
    untrained: Path, lettered: Callable[[str], np.ndarray]
) -> None:
    scorer = ClipScorer(clip_of(untrained, concepts=("ball", "cube", "ring")))
    pictures = [lettered(""), lettered("X")]
    found = scorer.measure(pictures, ["a ball", "a cube"])
    with torch.inference_mode():
        batch = torch.stack([scorer.transform(Image.fromarray(p)) for p in pictures])
        image = torch.nn.functional.normalize(scorer.model.encode_image(batch), dim=1)
        text = torch.nn.functional.normalize(scorer.model.encode_text(scorer.tokenize(["a ball", "a cube"])), dim=1)
    np.testing.assert_allclose(found.embedding, image.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.similarity, (image * text).sum(1).numpy(), atol=1e-5)
    assert found.embedding.dtype == np.float32
    assert found.aesthetic is None and found.offensive is None and set(found.concept) <= {"ball", "cube", "ring"}


@pytest.mark.parametrize("look", [check, ClipScorer])
def test_a_head_of_another_width_is_one_sentence(look: Callable, untrained: Path, tmp_path: Path) -> None:
    LinearHead(768, "score").save(tmp_path / "h.safetensors")
    with pytest.raises(InputError, match="the aesthetic head is for embeddings of 768 numbers, emu-demo gives 96"):
        look(clip_of(untrained, aesthetic_head=str(tmp_path / "h.safetensors")))


def test_what_is_wrong_with_a_head_is_told_on_the_driver_before_a_model_is_loaded(tmp_path: Path) -> None:
    LinearHead(768, "probability").save(tmp_path / "h.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no")
    clip = ClipModel(name="ViT-B-32", aesthetic_head=str(tmp_path / "broken.pth"))
    with pytest.raises(InputError, match="can't read the head .*broken.pth"):
        check(clip)
    with pytest.raises(InputError, match="expected a head that gives a score, found one that gives a probability"):
        check(dataclasses.replace(clip, aesthetic_head=str(tmp_path / "h.safetensors")))
    with pytest.raises(InputError, match="offensive head is for embeddings of 768 numbers, ViT-B-32 gives 512"):
        check(dataclasses.replace(clip, aesthetic_head=None, offensive_head=str(tmp_path / "h.safetensors")))
    check(ClipModel(name="ViT-L-14", offensive_head=str(tmp_path / "h.safetensors")))


def test_a_head_in_a_bucket_is_the_one_on_disk(untrained: Path, s3: S3Server) -> None:
    here = untrained / "heads" / "aesthetic.safetensors"
    Store(f"{s3.uri}/heads").put("aesthetic.safetensors", here)
    there = clip_of(untrained, aesthetic_head=f"{s3.uri}/heads/aesthetic.safetensors")
    assert check(there) == check(clip_of(untrained, aesthetic_head=str(here)))
    assert torch.equal(ClipScorer(there).heads["aesthetic"].weight, load_head(here, "score").weight)
    with pytest.raises(InputError, match=rf"file of aesthetic_head is missing: expected it at {s3.uri}/heads/none"):
        check(dataclasses.replace(there, aesthetic_head=f"{s3.uri}/heads/none.safetensors"))


def test_unknown_clips_are_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no weights 'opnai' .* one of .*openai"):
        check(ClipModel(pretrained="opnai"))
    with pytest.raises(RecipeError, match="a model such as"):
        check(ClipModel(name="ViT-Q-99"))
    assert check(ClipModel()) == {"clip_activation": "quick_gelu"}


def test_changed_weights_change_the_stations_inputs(untrained: Path, tmp_path: Path) -> None:
    names = {"open_clip_model.safetensors": "clip", "emu-demo.json": "clip_config", "bpe.txt.gz": "clip_vocabulary"}
    before = check(clip_of(untrained))
    for name, part in names.items():
        shutil.copytree(untrained / "clip", tmp_path / name / "clip")
        whole = (untrained / "clip" / name).read_bytes()
        (tmp_path / name / "clip" / name).write_bytes(whole[:-1] + b"\1")
        after = check(clip_of(tmp_path / name))
        assert {key for key in before if before[key] != after[key]} == {part}


def test_words_are_read_and_their_area_covers_them(reader: OcrScorer, lettered: Callable[[str], np.ndarray]) -> None:
    found = reader.measure([lettered("SALE"), lettered(""), lettered("FREE NOW")])
    assert [f.words for f in found] == [1, 0, 2]
    assert found[1].area == 0 and found[2].area > found[0].area > 0.05


def test_pictures_of_all_sizes_in_one_call_are_measured_as_alone(
    reader: OcrScorer, lettered: Callable[[str], np.ndarray]
) -> None:
    word = lettered("SALE")
    pictures = [word, np.vstack([word, lettered("")]), np.array(Image.fromarray(word).resize((300, 300))), word[:90]]
    together = reader.measure(pictures)
    assert together == [reader.measure([p])[0] for p in pictures]
    readable = together[:1] + together[2:]  # shrunk to the canvas, the tall one's letters are 3 px wide
    assert all(f.words == 1 and f.area > 0.03 for f in readable)


def test_the_canvas_is_the_one_easyocr_would_make(lettered: Callable[[str], np.ndarray]) -> None:
    import cv2
    from easyocr.imgproc import resize_aspect_ratio

    for picture in (lettered("SALE"), lettered("SALE")[:70], lettered("SALE")[:40, :33]):
        theirs, _, _ = resize_aspect_ratio(picture, 64, interpolation=cv2.INTER_LINEAR, mag_ratio=1)
        assert np.array_equal(_canvas(picture, 64), theirs.astype(np.uint8))


def test_missing_ocr_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't load easyocr's weights from"):
        OcrScorer(OcrSettings(model_dir=str(tmp_path)))


@pytest.fixture
def pairs(noise_picture: Callable[..., bytes]) -> pa.Table:
    """Pool rows of three pictures."""
    told = [Pair(image=noise_picture(n), caption="a ball", address=str(n)) for n in range(3)]
    return pa.concat_tables(pool_tables(told, Caps()))


@pytest.mark.parametrize("head", ["aesthetic", "offensive", "watermark"])
def test_a_score_that_is_not_finite_is_a_reason_and_no_score(untrained: Path, pairs: pa.Table, head: str) -> None:
    given = {"aesthetic": "aesthetic", "offensive": "offensive", "watermark": "offensive"}
    heads = {f"{name}_head": str(untrained / "heads" / f"{file}.safetensors") for name, file in given.items()}
    scorer = PairScorer(HardFloors(), clip_of(untrained, **heads))
    assert scorer(pairs)["gate_reason"].to_pylist() == [""] * 3
    torch.nn.init.constant_(scorer.clip.heads[head].bias, torch.nan)
    scored = scorer(pairs)
    assert scored["gate_reason"].to_pylist() == ["scorer_failed"] * 3
    for column in ("aesthetic", "offensive", "watermark", "clip_similarity", "embedding"):
        assert scored[column].null_count == 3, column


def test_a_picture_that_ocr_cannot_decode_again_gets_a_reason(untrained: Path, pairs: pa.Table) -> None:
    scored = PairScorer(HardFloors(), clip_of(untrained))(pairs)
    images = [*scored["image"].to_pylist()[:2], b"gone"]
    scored = scored.set_column(scored.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
    read = TextScorer(OcrSettings(canvas_px=64), ActorPool(), HardFloors(), 96)(scored)
    assert read["gate_reason"].to_pylist() == ["", "", "scorer_failed"]
    assert [area is None for area in read["text_area"].to_pylist()] == [False, False, True]
