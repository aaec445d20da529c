"""One pass of a CLIP image tower that serves five columns: the only file of curation that knows `open_clip`.

`measure` works on decoded pictures; `emu_ray.curation.pair_scorer` wraps it for Ray Data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from emu_ray.curation.heads import LinearHead, load_head
from emu_ray.errors import InputError, RecipeError
from emu_ray.models import small_clip


@dataclass(frozen=True, kw_only=True)
class ClipModel:
    """Which CLIP, which heads on it, and the concepts it tells apart."""

    name: str = "ViT-L-14"  # a model of open_clip
    pretrained: str = "openai"  # a tag of open_clip.list_pretrained() or a weight file
    folder: str | None = field(default=None, metadata={"affects_result": False})
    # the project's own small model instead: a folder with its config, vocabulary and weights; their digest counts
    aesthetic_head: str | None = field(default=None, metadata={"affects_result": False})  # None: not measured
    offensive_head: str | None = field(default=None, metadata={"affects_result": False})
    concepts: tuple[str, ...] = ("portrait", "food", "animal", "landscape", "car", "building", "plant", "object")
    concept_templates: tuple[str, ...] = ("a photo of a {}", "a picture of a {}")


@dataclass(frozen=True)
class ClipMeasures:
    """What one pass gives for N pictures; a head that isn't configured gives None."""

    embedding: np.ndarray  # (N, D) float32, unit norm
    similarity: np.ndarray  # (N,) float32, cosine with the caption, -1 to 1
    concept: list[str]
    aesthetic: np.ndarray | None  # (N,) float32, 0 to 10
    offensive: np.ndarray | None  # (N,) float32, 0 to 1


class ClipScorer:
    """CLIP, its heads and the text features of the concepts, loaded once; `device` is torch's."""

    def __init__(self, config: ClipModel, device: str = "cpu") -> None:
        self.config, self.device = config, device
        model, self.transform, self.tokenize = _load(config)
        self.model = model.to(device).eval()
        self.heads = {
            "aesthetic": config.aesthetic_head and load_head(config.aesthetic_head, "score").to(device),
            "offensive": config.offensive_head and load_head(config.offensive_head, "probability").to(device),
        }
        self.concept_features_CD = self._concept_features() if config.concepts else None

    @torch.inference_mode()
    def measure(self, pictures: list[np.ndarray], captions: list[str]) -> ClipMeasures:
        """Measure N decoded pictures, each (H, W, 3) uint8 of any size, with their captions."""
        batch = torch.stack([self.transform(Image.fromarray(p)) for p in pictures]).to(self.device)
        image_ND = self.model.encode_image(batch, normalize=True).float()
        text_ND = self._text(captions)
        return ClipMeasures(
            embedding=image_ND.cpu().numpy(),
            similarity=(image_ND * text_ND).sum(1).cpu().numpy(),
            concept=self._concepts(image_ND),
            aesthetic=self._head("aesthetic", image_ND),
            offensive=self._head("offensive", image_ND),
        )

    def _text(self, lines: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenize(lines).to(self.device), normalize=True).float()

    def _head(self, name: str, image_ND: torch.Tensor) -> np.ndarray | None:
        head = self.heads[name]
        if not isinstance(head, LinearHead):
            return None
        if head.width != image_ND.shape[1]:
            raise InputError(
                f"the {name} head is for embeddings of {head.width} numbers, "
                f"{self.config.name} gives {image_ND.shape[1]}: choose the head fitted on this model"
            )
        return head(image_ND).cpu().numpy()

    @torch.inference_mode()
    def _concept_features(self) -> torch.Tensor:
        """(C, D): for each concept the mean over its templates, as in arXiv 2103.00020, section 3.1.4."""
        rows = [
            self._text([template.format(name) for template in self.config.concept_templates]).mean(0)
            for name in self.config.concepts
        ]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def _concepts(self, image_ND: torch.Tensor) -> list[str]:
        if self.concept_features_CD is None:
            return [""] * len(image_ND)
        return [self.config.concepts[i] for i in (image_ND @ self.concept_features_CD.T).argmax(1).tolist()]


def check(config: ClipModel) -> dict[str, str]:
    """Digests (16 hex digits) of the weight files that `config` names, for a station's inputs; run it on the driver.

    RecipeError for an unknown model or tag, InputError for a file that is missing.
    """
    files = {"aesthetic_head": config.aesthetic_head, "offensive_head": config.offensive_head}
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
