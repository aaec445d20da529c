"""Which text-to-image models can be a base: ours, Stable Diffusion 1.x and 2.x, SDXL. What differs between them stands here alone.

Training, sampling and export ask a family and never a pipeline's class. Whether a folder is fit is asked of `base_folder.py`, before
any weight is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from emu_ray.generation.parts import read_part_unless
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.schedulers import SCHEDULERS, read_scheduler
from emu_ray.generation.tuned_folder import save_tuned_like
from emu_ray.models.autoencoder import Autoencoder, PublishedAutoencoder
from emu_ray.models.hub import read_json
from emu_ray.models.text import TextFeatures

ANY_CLASS: frozenset[str] = (
    frozenset()
)  # of tokenizers: each is read by the class that its family names, whatever the folder says


class Family(ABC):
    """What all models of one pipeline class share. It holds no weights: those are the pipeline's."""

    name: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    parts: ClassVar[
        Mapping[str, frozenset[str]]
    ]  # the folders that a pipeline must have, and the classes that each may name
    optional_parts: ClassVar[frozenset[str]] = frozenset()  # of the folder; copied to a tuned model, not loaded
    micro_conditioning: ClassVar[bool | None]  # None = as the U-Net's config says

    @abstractmethod
    def load(
        self, folder: Path, unet: UNet2DConditionModel | None = None, *, without: Collection[str] = ()
    ) -> DiffusionPipeline:
        """The pipeline in float32, with no code of the folder run; `unet` stands in for the saved one. InputError for corrupt weights.

        Networks that `without` names are None: whoever encodes texts needs no U-Net.
        """

    @abstractmethod
    def features(self, pipeline: Any, captions: list[str]) -> TextFeatures:
        """What the U-Net is told of the captions, exactly as the pipeline tells it."""

    @abstractmethod
    def widths(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int | None]:
        """Channels of the token features and of the pooled ones, by the configs of the parts."""

    def save(self, pipeline: Any, base: Path, folder: Path) -> None:
        """Writes the pipeline, tuned from the folder `base`, in the base's own layout."""
        save_tuned_like(pipeline, base, folder)

    def unconditional(self, pipeline: Any) -> TextFeatures:
        """What the U-Net is told where there is no caption (B = 1): that which the pipeline guides away from by default."""
        return self.features(pipeline, [""])

    def autoencoder(self, pipeline: Any) -> Autoencoder:
        """The pipeline's own, behind the one interface of all."""
        return PublishedAutoencoder(pipeline.vae).to(pipeline.vae.device)

    def size_px(self, pipeline: Any) -> int:
        """Side of the images that the model was trained at."""
        return int(pipeline.unet.config.sample_size * self.autoencoder(pipeline).downsampling)


class EmuFamily(Family):
    """Our own: CLIP and T5, an autoencoder of any kind; sizes and crops are told where the U-Net was built so."""

    name = "emu"
    pipeline_class = EmuPipeline
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "vae": frozenset({"FourierAutoencoder", "AutoencoderKL"}),
        "text_encoder": frozenset({"CLIPTextModel"}),
        "tokenizer": ANY_CLASS,
        "text_encoder_2": frozenset({"T5EncoderModel"}),
        "tokenizer_2": ANY_CLASS,
        "unet": frozenset({"UNet2DConditionModel"}),
        "scheduler": frozenset({"DDIMScheduler"}),
    }
    micro_conditioning = None

    def load(
        self, folder: Path, unet: UNet2DConditionModel | None = None, *, without: Collection[str] = ()
    ) -> EmuPipeline:
        """The pipeline that `EmuPipeline.save_pretrained` wrote."""
        return EmuPipeline.load(folder, unet, without)

    def features(self, pipeline: EmuPipeline, captions: list[str]) -> TextFeatures:
        """Both encoders joined, and CLIP's pooled feature."""
        return pipeline.texts.features(captions)

    def widths(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int | None]:
        """CLIP's and T5's side by side; pooled is CLIP's."""
        clip = configs["text_encoder"]["hidden_size"]
        return clip + configs["text_encoder_2"]["d_model"], clip

    def save(self, pipeline: EmuPipeline, base: Path, folder: Path) -> None:
        """Whole, since `base` may have been the text encoders alone."""
        pipeline.save_pretrained(folder)

    def autoencoder(self, pipeline: EmuPipeline) -> Autoencoder:
        """Ours as it is, a published one behind the interface."""
        return pipeline.autoencoder


class StableDiffusionFamily(Family):
    """Stable Diffusion 1.x and 2.x: one CLIP, whose depth in its own config says which layer is read (the last but one in 2.x)."""

    name = "sd"
    pipeline_class = StableDiffusionPipeline
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "vae": frozenset({"AutoencoderKL"}),
        "text_encoder": frozenset({"CLIPTextModel"}),
        "tokenizer": ANY_CLASS,
        "unet": frozenset({"UNet2DConditionModel"}),
        "scheduler": SCHEDULERS,
    }
    optional_parts = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
    micro_conditioning = False

    def load(
        self, folder: Path, unet: UNet2DConditionModel | None = None, *, without: Collection[str] = ()
    ) -> StableDiffusionPipeline:
        """Without the safety checker, which would blacken what is to be judged; a tuned folder has it again."""
        return StableDiffusionPipeline(
            vae=read_part_unless(without, AutoencoderKL, folder / "vae"),
            text_encoder=read_part_unless(without, CLIPTextModel, folder / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            unet=unet or read_part_unless(without, UNet2DConditionModel, folder / "unet"),
            scheduler=read_scheduler(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @torch.no_grad()
    def features(self, pipeline: StableDiffusionPipeline, captions: list[str]) -> TextFeatures:
        """By the pipeline's own `encode_prompt`; it has no pooled features."""
        tokens, _ = pipeline.encode_prompt(captions, pipeline.text_encoder.device, 1, False)
        return TextFeatures(tokens)

    def widths(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int | None]:
        """CLIP's."""
        return configs["text_encoder"]["hidden_size"], None


class StableDiffusionXLFamily(Family):
    """SDXL's base model: two CLIPs side by side, the second's projection as pooled feature, sizes and crops."""

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        **StableDiffusionFamily.parts,
        "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
        "tokenizer_2": ANY_CLASS,
    }
    optional_parts = frozenset({"feature_extractor", "image_encoder"})
    micro_conditioning = True

    def load(
        self, folder: Path, unet: UNet2DConditionModel | None = None, *, without: Collection[str] = ()
    ) -> StableDiffusionXLPipeline:
        """Without the watermark that diffusers adds where a package for it is installed: our pictures are as the model drew them."""
        index = read_json(folder / "model_index.json")
        return StableDiffusionXLPipeline(
            vae=read_part_unless(without, AutoencoderKL, folder / "vae"),
            text_encoder=read_part_unless(without, CLIPTextModel, folder / "text_encoder"),
            text_encoder_2=read_part_unless(without, CLIPTextModelWithProjection, folder / "text_encoder_2"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            unet=unet or read_part_unless(without, UNet2DConditionModel, folder / "unet"),
            scheduler=read_scheduler(folder / "scheduler"),
            force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
            add_watermarker=False,
        )

    @torch.no_grad()
    def features(self, pipeline: StableDiffusionXLPipeline, captions: list[str]) -> TextFeatures:
        """By the pipeline's own `encode_prompt`: the last layer but one of both encoders."""
        device = pipeline.text_encoder.device
        tokens, _, pooled, _ = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        return TextFeatures(tokens, pooled)

    def unconditional(self, pipeline: StableDiffusionXLPipeline) -> TextFeatures:
        """Zeros where the folder says `force_zeros_for_empty_prompt`, as SDXL's own training dropped its captions; else those of ""."""
        empty = self.features(pipeline, [""])
        if not pipeline.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.pooled_BD is not None
        return TextFeatures(torch.zeros_like(empty.tokens_BTD), torch.zeros_like(empty.pooled_BD))

    def widths(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, int | None]:
        """Both CLIPs' side by side; pooled is the second's projection."""
        second = configs["text_encoder_2"]
        return configs["text_encoder"]["hidden_size"] + second["hidden_size"], second["projection_dim"]


EMU = EmuFamily()
FAMILIES: Mapping[str, Family] = {
    family.pipeline_class.__name__: family for family in (EMU, StableDiffusionFamily(), StableDiffusionXLFamily())
}


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline."""
    return FAMILIES[type(pipeline).__name__]
