"""One pass of a CLIP image tower that serves six columns: the only file of curation that knows `open_clip`.

`measure` works on decoded pictures; `emu_ray.curation.pair_scorer` wraps it for Ray Data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
from PIL import Image

from emu_ray.curation.concepts import read_concepts
from emu_ray.curation.heads import LinearHead, load_head
from emu_ray.curation.safety_concepts import SafetyConcepts, load_safety_concepts
from emu_ray.errors import InputError, RecipeError
from emu_ray.models import small_clip

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ClipModel:
    """Which CLIP, which heads on it, and the concepts it tells apart; None: not measured."""

    name: str = "ViT-L-14"  # a model of open_clip
    pretrained: str = "openai"  # a tag of open_clip.list_pretrained() or a weight file
    folder: str | None = field(default=None, metadata={"affects_result": False})
    # the project's own small model instead: a folder with its config, vocabulary and weights; their digest counts
    dtype: Dtype = "float32"  # of the towers' arithmetic; scores are float32
    aesthetic_head: str | None = field(default=None, metadata={"affects_result": False})
    offensive_head: str | None = field(default=None, metadata={"affects_result": False})
    safety_concepts: str | None = None  # instead of an offensive head: a Stable Diffusion safety checker
    watermark_head: str | None = field(default=None, metadata={"affects_result": False})
    watermark_phrases: tuple[str, ...] = ()  # instead of a head: zero-shot against clean_phrases
    clean_phrases: tuple[str, ...] = ("a photo", "a clean photo without any text")
    concepts_file: str | None = field(default=None, metadata={"affects_result": False})
    # a YAML file shaped like emu_ray/curation/concepts.yaml, in place of the next three
    concepts: tuple[str, ...] = ()
    concept_phrases: tuple[tuple[str, ...], ...] = ()  # of each concept; (): its name
    concept_templates: tuple[str, ...] = ("a photo of a {}", "a picture of a {}")

    def resolved(self) -> ClipModel:
        """With the content of `concepts_file` in place of its name; InputError when that can't be read."""
        if self.concepts_file is None:
            return self
        found, templates = read_concepts(self.concepts_file)
        return replace(
            self,
            concepts_file=None,
            concepts=tuple(c.name for c in found),
            concept_phrases=tuple(c.phrases for c in found),
            concept_templates=templates,
        )


@dataclass(frozen=True)
class ClipMeasures:
    """What one pass gives for N pictures; what isn't configured gives None."""

    embedding: np.ndarray  # (N, D) float32, unit norm
    similarity: np.ndarray  # (N,) float32, cosine with the caption, -1 to 1
    concept: list[str]
    aesthetic: np.ndarray | None  # (N,) float32, 0 to 10
    offensive: np.ndarray | None  # (N,) float32, 0 to 1
    watermark: np.ndarray | None  # (N,) float32, 0 to 1


class ClipScorer:
    """CLIP, its heads and the text features of the concepts, loaded once; `device` is torch's."""

    def __init__(self, config: ClipModel, device: str = "cpu") -> None:
        self.config, self.device = config.resolved(), device
        model, self.transform, self.tokenize = _load(config)
        self.model = model.to(device).eval()
        self.heads: dict[str, LinearHead | SafetyConcepts] = {}
        if config.aesthetic_head:
            self.heads["aesthetic"] = load_head(config.aesthetic_head, "score")
        if config.safety_concepts:
            self.heads["offensive"] = load_safety_concepts(config.safety_concepts)
        elif config.offensive_head:
            self.heads["offensive"] = load_head(config.offensive_head, "probability")
        if config.watermark_head:
            self.heads["watermark"] = load_head(config.watermark_head, "probability")
        self.heads = {name: head.to(device).eval() for name, head in self.heads.items()}
        self.concept_features_CD = self._concept_features() if self.config.concepts else None
        self.watermark_features_2D = self._watermark_features() if config.watermark_phrases else None

    def measure(self, pictures: list[np.ndarray], captions: list[str]) -> ClipMeasures:
        """Measure N decoded pictures, each (H, W, 3) uint8 of any size, with their captions.

        Where a GPU's memory doesn't hold them at once, they are measured in halves.
        """
        batch = torch.stack([self.transform(Image.fromarray(p)) for p in pictures])
        image_ND, text_ND = self._image(batch), self._text(captions)
        return ClipMeasures(
            embedding=image_ND.cpu().numpy(),
            similarity=(image_ND * text_ND).sum(1).cpu().numpy(),
            concept=self._concepts(image_ND),
            aesthetic=self._head("aesthetic", image_ND),
            offensive=self._head("offensive", image_ND),
            watermark=self._watermark(image_ND),
        )

    @torch.inference_mode()
    def _image(self, batch: torch.Tensor) -> torch.Tensor:
        try:
            with self._precision():
                return self.model.encode_image(batch.to(self.device), normalize=True).float()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            return torch.cat([self._image(half) for half in batch.split(-(-len(batch) // 2))])

    @torch.inference_mode()
    def _text(self, lines: list[str]) -> torch.Tensor:
        with self._precision():
            return self.model.encode_text(self.tokenize(lines).to(self.device), normalize=True).float()

    def _precision(self) -> torch.autocast:
        kind = getattr(torch, self.config.dtype)
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, kind, enabled=kind != torch.float32)

    @torch.inference_mode()
    def _head(self, name: str, image_ND: torch.Tensor) -> np.ndarray | None:
        head = self.heads.get(name)
        if head is None:
            return None
        if head.width != image_ND.shape[1]:
            raise InputError(
                f"the {name} head is for embeddings of {head.width} numbers, "
                f"{self.config.name} gives {image_ND.shape[1]}: choose the head fitted on this model"
            )
        return head(image_ND).cpu().numpy()

    def _watermark(self, image_ND: torch.Tensor) -> np.ndarray | None:
        """By the head, or zero-shot: the softmax of the two mean phrases at CLIP's own temperature."""
        if self.watermark_features_2D is None:
            return self._head("watermark", image_ND)
        scale = self.model.logit_scale.detach().exp().float()
        return (scale * image_ND @ self.watermark_features_2D.T).softmax(1)[:, 0].cpu().numpy()

    def _watermark_features(self) -> torch.Tensor:
        sides = (self.config.watermark_phrases, self.config.clean_phrases)
        return torch.nn.functional.normalize(torch.stack([self._text(list(p)).mean(0) for p in sides]), dim=1)

    def _concept_features(self) -> torch.Tensor:
        """(C, D): for each concept the mean over its phrases in its templates, as in arXiv 2103.00020, section 3.1.4."""
        phrases = self.config.concept_phrases or tuple((name,) for name in self.config.concepts)
        templates = self.config.concept_templates
        rows = [self._text([t.format(p) for p in several for t in templates]).mean(0) for several in phrases]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def _concepts(self, image_ND: torch.Tensor) -> list[str]:
        if self.concept_features_CD is None:
            return [""] * len(image_ND)
        return [self.config.concepts[i] for i in (image_ND @ self.concept_features_CD.T).argmax(1).tolist()]


def check(config: ClipModel) -> dict[str, str]:
    """Digests (16 hex digits) of the weight files that `config` names, for a station's inputs; run it on the driver.

    RecipeError for an unknown model or tag, InputError for a file that is missing.
    """
    if config.safety_concepts and config.offensive_head:
        raise RecipeError("expected either an offensive_head or safety_concepts, found both: set one to None")
    if config.watermark_phrases and config.watermark_head:
        raise RecipeError("expected either a watermark_head or watermark_phrases, found both: set one to None")
    heads = ("aesthetic_head", "offensive_head", "watermark_head")
    files: dict[str, str | None] = {name: getattr(config, name) for name in heads}
    if config.folder is not None:
        files["clip"] = str(Path(config.folder) / "open_clip_model.safetensors")
    elif Path(config.pretrained).is_file():
        files["clip"] = config.pretrained
    elif (config.name, config.pretrained) not in open_clip.list_pretrained():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.name))
        raise RecipeError(
            f"open_clip has no weights {config.pretrained!r} for a model {config.name!r}: expected a weight file or "
            + (f"one of {tags}" if tags else f"a model such as {', '.join(open_clip.list_models()[:3])}")
        )
    if config.safety_concepts:
        load_safety_concepts(config.safety_concepts)
    if config.concept_phrases and len(config.concept_phrases) != len(config.concepts):
        raise RecipeError(f"expected phrases of {len(config.concepts)} concepts, found {len(config.concept_phrases)}")
    if config.concepts and not all("{}" in t for t in config.concept_templates or ("",)):
        raise RecipeError("every concept template needs a {} where the concept's name goes")
    return {name: _digest(Path(path), name) for name, path in files.items() if path is not None}


def _digest(path: Path, name: str) -> str:
    if not path.is_file():
        raise InputError(f"the weights of {name} are missing: expected a file at {path}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _load(config: ClipModel):  # type: ignore[no-untyped-def]  # open_clip's own types are loose
    try:
        if config.folder is not None:
            model, transform = small_clip.load(Path(config.folder))
            return model, transform, small_clip.tokenizer(Path(config.folder))
        model, _, transform = open_clip.create_model_and_transforms(config.name, pretrained=config.pretrained)
        return model, transform, open_clip.get_tokenizer(config.name)
    except (OSError, RuntimeError) as error:
        said = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise InputError(f"can't load the CLIP {config.name} ({config.folder or config.pretrained}): {said}") from error
