"""One pass of a CLIP image tower that serves six columns: the only file of curation that knows `open_clip`.

`measure` works on decoded pictures; `emu_ray.curation.pair_scorer` wraps it for Ray Data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
from PIL import Image

from emu_ray.curation.concepts import is_template, read_concepts
from emu_ray.curation.heads import Kind, LinearHead, load_head
from emu_ray.curation.safety_concepts import SafetyConcepts, load_safety_concepts
from emu_ray.errors import InputError, RecipeError, first_line
from emu_ray.models import small_clip
from emu_ray.stations import open_filesystem

Dtype = Literal["float32", "bfloat16", "float16"]
HEADS: dict[str, Kind] = {"aesthetic": "score", "offensive": "probability", "watermark": "probability"}


@dataclass(frozen=True, kw_only=True)
class ClipModel:
    """Which CLIP, which heads on it, and the concepts it tells apart; None: not measured."""

    name: str = "ViT-L-14"  # a model of open_clip
    pretrained: str = "openai"  # a tag of open_clip.list_pretrained(), or a weight file
    # a tag brings its activation; for a file `name` tells it, e.g. ViT-L-14-quickgelu for OpenAI's weights
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
        self.heads = {name: head.to(device).eval() for name, head in _heads(config).items()}
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

    def offensive(self, pictures: list[np.ndarray]) -> np.ndarray:
        """(N,) float32, 0 to 1, of N decoded pictures; RecipeError where no head was configured."""
        rated = self._head(
            "offensive", self._image(torch.stack([self.transform(Image.fromarray(p)) for p in pictures]))
        )
        if rated is None:
            raise RecipeError("expected an offensive_head or safety_concepts, found neither: name one")
        return rated

    def _image(self, batch: torch.Tensor) -> torch.Tensor:
        return self._encoded(self.model.encode_image, batch)

    def _text(self, lines: list[str]) -> torch.Tensor:
        return self._encoded(self.model.encode_text, self.tokenize(lines))

    @torch.inference_mode()
    def _encoded(self, encode: Callable[..., torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """At once, or in halves where memory ends."""
        try:
            with self._precision():
                return encode(batch.to(self.device), normalize=True).float()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()  # here, since the error held what the pass had taken
        return torch.cat([self._encoded(encode, half) for half in batch.split(-(-len(batch) // 2))])

    def _precision(self) -> torch.autocast:
        kind = getattr(torch, self.config.dtype)
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, kind, enabled=kind != torch.float32)

    @torch.inference_mode()
    def _head(self, name: str, image_ND: torch.Tensor) -> np.ndarray | None:
        head = self.heads.get(name)
        return None if head is None else head(image_ND).cpu().numpy()

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
    """Digests (16 hex digits) of what `config` names and scores depend on, for a station's inputs; run it on the driver.

    RecipeError for an unknown model or tag, InputError for a file that is missing, and for a head that can't be read
    or was fitted on another model.
    """
    if config.safety_concepts and config.offensive_head:
        raise RecipeError("expected either an offensive_head or safety_concepts, found both: set one to None")
    if config.watermark_phrases and config.watermark_head:
        raise RecipeError("expected either a watermark_head or watermark_phrases, found both: set one to None")
    if config.concept_phrases and len(config.concept_phrases) != len(config.concepts):
        raise RecipeError(f"expected phrases of {len(config.concepts)} concepts, found {len(config.concept_phrases)}")
    if config.concepts and not all(is_template(t) for t in config.concept_templates or ("",)):
        raise RecipeError("every concept template needs one {} where the concept's name goes, and no other brace")
    digests = {name: _digest(address, name) for name, address in _files(config).items()}
    if "clip" not in digests:
        digests["clip_activation"] = "quick_gelu" if _has_quick_gelu(config) else "gelu"
    for head in _heads(config).values():
        if isinstance(head, SafetyConcepts):
            digests["safety_concepts"] = head.digest()
    return digests


def _files(config: ClipModel) -> dict[str, str]:
    """Name -> address of each file that decides about the scores; RecipeError when open_clip hasn't the model or tag."""
    addresses = {f"{name}_head": getattr(config, f"{name}_head") for name in HEADS}
    files = {name: address for name, address in addresses.items() if address is not None}
    if config.folder is not None:
        names = ("open_clip_model.safetensors", f"{small_clip.NAME}.json", "bpe.txt.gz")
        parts = zip(("clip", "clip_config", "clip_vocabulary"), names, strict=True)
        return files | {part: str(Path(config.folder) / name) for part, name in parts}
    if Path(config.pretrained).is_file() and config.name in open_clip.list_models():
        return files | {"clip": config.pretrained}
    if (config.name, config.pretrained) not in open_clip.list_pretrained():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.name))
        raise RecipeError(
            f"open_clip has no weights {config.pretrained!r} for a model {config.name!r}: expected a weight file or "
            + (f"one of {tags}" if tags else f"a model such as {', '.join(open_clip.list_models()[:3])}")
        )
    return files


def _digest(address: str, name: str) -> str:
    """Of a file, local or on s3://."""
    system, path = open_filesystem(address)
    digest = hashlib.sha256()
    try:
        with system.open_input_stream(path, compression=None) as stream:  # else it unpacks a .gz
            while block := stream.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise InputError(f"the file of {name} is missing: expected it at {address}") from None
    except OSError as error:
        raise InputError(f"can't read the file of {name}, {address}: {error}") from error
    return digest.hexdigest()[:16]


def _heads(config: ClipModel) -> dict[str, LinearHead | SafetyConcepts]:
    """Column -> head; InputError as `load_head`, and for one that was fitted on embeddings of another width."""
    addresses = {name: getattr(config, f"{name}_head") for name in HEADS}
    heads: dict[str, LinearHead | SafetyConcepts] = {
        name: load_head(address, HEADS[name]) for name, address in addresses.items() if address is not None
    }
    if config.safety_concepts:
        heads["offensive"] = load_safety_concepts(config.safety_concepts)
    for name, head in heads.items():
        if head.width != (width := _embedding_width(config)):
            raise InputError(
                f"the {name} head is for embeddings of {head.width} numbers, "
                f"{config.name} gives {width}: choose the head fitted on this model"
            )
    return heads


def _has_quick_gelu(config: ClipModel) -> bool:
    """Of the weights of a tag."""
    return bool(open_clip.get_pretrained_cfg(config.name, config.pretrained).get("quick_gelu", False))


def _embedding_width(config: ClipModel) -> int:
    """By the model's config alone."""
    if config.folder is None:
        return int(open_clip.get_model_config(config.name)["embed_dim"])
    small_clip.register(Path(config.folder))
    return int(open_clip.get_model_config(small_clip.NAME)["embed_dim"])


def _load(config: ClipModel):  # type: ignore[no-untyped-def]  # open_clip's own types are loose
    try:
        if config.folder is not None:
            model, transform = small_clip.load(Path(config.folder))
            return model, transform, small_clip.tokenizer(Path(config.folder))
        model, _, transform = open_clip.create_model_and_transforms(
            config.name,
            pretrained=config.pretrained,
            force_quick_gelu=_has_quick_gelu(config),  # open_clip only warns that a tag's activation is another
        )
        return model, transform, open_clip.get_tokenizer(config.name)
    except (OSError, RuntimeError) as error:
        said = first_line(error)[:300]
        raise InputError(f"can't load the CLIP {config.name} ({config.folder or config.pretrained}): {said}") from error
