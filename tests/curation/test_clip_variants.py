"""Published weight formats and the variants of offensive content, watermark and concepts on one CLIP pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from emu_ray.curation.classifier_scorer import Classifier, ClassifierScorer, check_classifier
from emu_ray.curation.clip_scorer import ClipModel, ClipScorer, check
from emu_ray.curation.concepts import SHIPPED, read_concepts
from emu_ray.curation.heads import load_head
from emu_ray.curation.safety_concepts import load_safety_concepts
from emu_ray.errors import InputError, RecipeError


def clip_of(weights: Path, **changes: object) -> ClipModel:
    return ClipModel(name="emu-demo", folder=str(weights / "clip"), **changes)  # type: ignore[arg-type]


def test_laions_five_layer_head_gives_what_its_layers_give(tmp_path: Path) -> None:
    """The layout of improved-aesthetic-predictor: 768 -> 1024 -> 128 -> 64 -> 16 -> 1 with dropout between."""

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    theirs = Theirs().eval()
    nn.init.constant_(theirs.layers[-1].bias, 5.0)
    torch.save(theirs.state_dict(), tmp_path / "head.pth")
    embeddings = nn.functional.normalize(torch.randn(7, 768), dim=1)
    ours = load_head(tmp_path / "head.pth", "score")
    torch.testing.assert_close(ours(embeddings), theirs(embeddings)[:, 0], rtol=1e-5, atol=1e-5)
    assert ours.width == 768


def test_a_head_with_an_unknown_layout_is_named(tmp_path: Path) -> None:
    torch.save(
        {"layers.0.weight": torch.zeros(3, 4), "layers.0.bias": torch.zeros(3), "other": torch.zeros(1)},
        tmp_path / "h.pth",
    )
    with pytest.raises(InputError, match=r"found .*other \(1,\)"):
        load_head(tmp_path / "h.pth", "score")


@pytest.fixture
def checker(tmp_path: Path) -> Path:
    """A folder in the layout of diffusers' StableDiffusionSafetyChecker, for embeddings of 96 numbers."""
    torch.manual_seed(1)
    tensors = {
        "concept_embeds": torch.randn(17, 96),
        "concept_embeds_weights": torch.full((17,), 0.25),
        "special_care_embeds": torch.randn(3, 96),
        "special_care_embeds_weights": torch.full((3,), 0.2),
        "visual_projection.weight": torch.randn(96, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_safety_concepts_flag_exactly_what_the_checker_flags(checker: Path) -> None:
    """Against the rule of diffusers' forward_onnx, written out: cosine - threshold + adjustment > 0."""
    concepts = load_safety_concepts(str(checker))
    embeddings = nn.functional.normalize(torch.randn(200, 96), dim=1)
    found = concepts(embeddings)
    for embedding, value in zip(embeddings, found, strict=True):
        care = [float(torch.cosine_similarity(embedding, c, 0)) - 0.2 for c in concepts.special_care_embeds]
        adjustment = 0.01 if max(care) > 0 else 0.0
        flagged = any(
            float(torch.cosine_similarity(embedding, c, 0)) - 0.25 + adjustment > 0 for c in concepts.concept_embeds
        )
        assert (float(value) > 0.5) == flagged
    assert 0.02 < float((found > 0.5).float().mean()) < 0.98


def test_safety_concepts_are_a_variant_of_the_recipe(
    untrained: Path, checker: Path, lettered: Callable[[str], np.ndarray]
) -> None:
    config = clip_of(untrained, safety_concepts=str(checker))
    check(config)
    found = ClipScorer(config).measure([lettered("A")], ["a"])
    assert found.offensive is not None and 0 <= found.offensive[0] <= 1
    with pytest.raises(RecipeError, match="either an offensive_head or safety_concepts"):
        check(clip_of(untrained, safety_concepts=str(checker), offensive_head="x"))


def test_a_checker_without_its_tensors_is_one_sentence(tmp_path: Path) -> None:
    save_file({"concept_embeds": torch.zeros(1, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="'concept_embeds_weights' is missing"):
        load_safety_concepts(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected model.safetensors or pytorch_model.bin"):
        load_safety_concepts(str(tmp_path / "empty"))


def test_a_watermark_is_measured_zero_shot(untrained: Path, lettered: Callable[[str], np.ndarray]) -> None:
    config = clip_of(untrained, watermark_phrases=("a watermark",), clean_phrases=("a photo",))
    scorer = ClipScorer(config)
    found = scorer.measure([lettered("A"), lettered("")], ["a", "b"])
    assert found.watermark is not None and found.watermark.shape == (2,)
    text = scorer._text(["a watermark", "a photo"])
    expected = (scorer.model.logit_scale.detach().exp() * torch.from_numpy(found.embedding) @ text.T).softmax(1)[:, 0]
    np.testing.assert_allclose(found.watermark, expected.numpy(), atol=1e-5)


def test_the_shipped_concepts_are_read_and_used(untrained: Path, lettered: Callable[[str], np.ndarray]) -> None:
    concepts, templates = read_concepts(SHIPPED)
    assert len(concepts) >= 10 and all("{}" in t for t in templates)
    config = clip_of(untrained, concepts_file=str(SHIPPED))
    assert config.resolved().concepts == tuple(c.name for c in concepts)
    assert ClipScorer(config).measure([lettered("A")], ["a"]).concept[0] in config.resolved().concepts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected a mapping `concepts`"),
        ("concepts: [a, b]", "expected a mapping `concepts`"),
        ("concepts: {a: 3}", "expected the concept 'a' to be a name with a list"),
        ("templates: [a photo]\nconcepts: {a: []}", "each hold one {}"),
        ("concepts: {a: [", "can't read the concepts"),
    ],
)
def test_a_wrong_concepts_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_concepts(tmp_path / "c.yaml")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lower_precision_gives_nearly_the_same_scores(
    untrained: Path, lettered: Callable[[str], np.ndarray], dtype: str
) -> None:
    pictures = [lettered("A"), lettered("")]
    exact = ClipScorer(clip_of(untrained)).measure(pictures, ["a", "b"])
    rough = ClipScorer(clip_of(untrained, dtype=dtype)).measure(pictures, ["a", "b"])
    assert rough.embedding.dtype == np.float32
    np.testing.assert_allclose(rough.embedding, exact.embedding, atol=0.03)


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
