"""CLIP and OCR outside Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_ray.curation.clip_scorer import ClipModel, ClipScorer, check
from emu_ray.curation.heads import LinearHead
from emu_ray.curation.ocr_scorer import OcrScorer, OcrSettings, _canvas
from emu_ray.errors import InputError, RecipeError


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


def test_a_head_of_another_width_is_one_sentence(untrained: Path, tmp_path: Path) -> None:
    LinearHead(768, "score").save(tmp_path / "h.safetensors")
    scorer = ClipScorer(clip_of(untrained, aesthetic_head=str(tmp_path / "h.safetensors")))
    with pytest.raises(InputError, match="the aesthetic head is for embeddings of 768 numbers, emu-demo gives 96"):
        scorer.measure([np.zeros((8, 8, 3), np.uint8)], ["a"])


def test_unknown_clips_are_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no weights 'opnai' .* one of .*openai"):
        check(ClipModel(pretrained="opnai"))
    with pytest.raises(RecipeError, match="a model such as"):
        check(ClipModel(name="ViT-Q-99"))
    assert check(ClipModel()) == {}


def test_changed_weights_change_the_stations_inputs(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    whole = (untrained / "clip" / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "clip" / "open_clip_model.safetensors").write_bytes(whole[:-1] + b"\1")
    assert check(clip_of(untrained)) != check(clip_of(tmp_path))


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
