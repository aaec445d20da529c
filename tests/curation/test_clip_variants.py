"""Published weight formats and the variants of offensive content, watermark and concepts on one CLIP pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import nn

from emu_ray.curation import safety_concepts
from emu_ray.curation.clip_scorer import ClipModel, ClipScorer, check
from emu_ray.curation.concepts import SHIPPED, read_concepts
from emu_ray.curation.heads import load_head
from emu_ray.curation.safety_concepts import load_safety_concepts
from emu_ray.errors import InputError, RecipeError
from jobs.score import RECIPES


def clip_of(weights: Path, **changes: object) -> ClipModel:
    return ClipModel(name="emu-demo", folder=str(weights / "clip"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.clip.folder is None])
def test_a_published_clip_has_the_activation_it_was_trained_with(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights want QuickGELU, which open_clip's models of these names don't have; here with one layer."""
    clip = RECIPES[recipe].clip
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, clip.name, config)
    save_file(open_clip.create_model(clip.name, load_weights=False).state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "w.safetensors"))
    model = ClipScorer(ClipModel(name=clip.name, pretrained=clip.pretrained)).model
    towers = (model.visual.transformer, model.transformer)
    assert [type(t.resblocks[0].mlp.gelu) for t in towers] == [open_clip.transformer.QuickGELU] * 2


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
    """Against diffusers' own `forward` on the same embeddings, many of them within its rounding of a bound."""
    concepts = load_safety_concepts(str(checker))
    axes = nn.functional.normalize(torch.cat([concepts.concept_embeds, concepts.special_care_embeds]), dim=1)
    aside = nn.functional.normalize(torch.randn(100, 96), dim=1)
    near = [_with_cosine(a, e, bound) for a, bound in zip(axes, [0.25] * 17 + [0.2] * 3, strict=True) for e in aside]
    embeddings = torch.cat([nn.functional.normalize(torch.randn(200, 96), dim=1), torch.stack(near)])
    found = concepts(embeddings)
    theirs = SimpleNamespace(
        vision_model=lambda x: (None, x), visual_projection=nn.Identity(), **dict(concepts.named_buffers())
    )
    _, flagged = StableDiffusionSafetyChecker.forward(theirs, embeddings, torch.zeros(len(embeddings), 1))
    assert (found > 0.5).tolist() == flagged
    assert 0.02 < float((found > 0.5).float().mean()) < 0.98


def _with_cosine(axis: torch.Tensor, aside: torch.Tensor, cosine: float) -> torch.Tensor:
    """A unit vector in the plane of both whose cosine with `axis` is `cosine` give or take 0.001."""
    cosine += 0.002 * float(torch.rand(())) - 0.001
    across = nn.functional.normalize(aside - (aside @ axis) * axis, dim=0)
    return cosine * axis + (1 - cosine**2) ** 0.5 * across


def test_a_checker_that_cannot_be_had_is_one_sentence_also_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError

    monkeypatch.setattr(safety_concepts, "hf_hub_download", fail)
    with pytest.raises(InputError, match=r"nor had from the hub \(OSError\)"):
        load_safety_concepts("acme/checker")


def test_safety_concepts_are_a_variant_of_the_recipe(
    untrained: Path, checker: Path, lettered: Callable[[str], np.ndarray]
) -> None:
    config = clip_of(untrained, safety_concepts=str(checker))
    digest = check(config)["safety_concepts"]
    whole = load_file(checker / "model.safetensors")
    save_file({**whole, "concept_embeds_weights": torch.full((17,), 0.3)}, checker / "model.safetensors")
    assert check(config)["safety_concepts"] != digest
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


def test_a_checker_of_tensors_that_are_not_finite_is_refused(checker: Path) -> None:
    whole = load_file(checker / "model.safetensors")
    save_file({**whole, "concept_embeds": torch.full((17, 96), torch.nan)}, checker / "model.safetensors")
    with pytest.raises(InputError, match="expected finite tensors"):
        load_safety_concepts(str(checker))


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
        ("templates: ['a {x} photo of {}']\nconcepts: {a: []}", "each hold one {} and no other brace"),
        ("concepts: {a: [", "can't read the concepts"),
    ],
)
def test_a_wrong_concepts_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_concepts(tmp_path / "c.yaml")


@pytest.mark.parametrize("template", ["a photo", "a {x} photo of {}", "{} and {}"])
def test_a_template_of_the_recipe_that_cannot_be_filled_is_refused(untrained: Path, template: str) -> None:
    with pytest.raises(RecipeError, match="needs one {} where the concept's name goes"):
        check(clip_of(untrained, concepts=("ball",), concept_templates=(template,)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lower_precision_gives_nearly_the_same_scores(
    untrained: Path, lettered: Callable[[str], np.ndarray], dtype: str
) -> None:
    pictures = [lettered("A"), lettered("")]
    exact = ClipScorer(clip_of(untrained)).measure(pictures, ["a", "b"])
    rough = ClipScorer(clip_of(untrained, dtype=dtype)).measure(pictures, ["a", "b"])
    assert rough.embedding.dtype == np.float32
    np.testing.assert_allclose(rough.embedding, exact.embedding, atol=0.03)
