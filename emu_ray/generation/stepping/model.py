"""A loaded pipeline of any family, as the engine uses it: texts, first noise, one pass of the U-Net, pictures."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from emu_ray.errors import RecipeError
from emu_ray.generation.families import family_of
from emu_ray.generation.stepping.solvers import SolverTable, solver_table
from emu_ray.models.denoiser import conditions, is_micro_conditioned, whole_picture_ids
from emu_ray.models.text import TextFeatures

TEXTS_KEPT = 256  # prompts, each of a few hundred KB at most


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture that is asked for."""

    prompt: str
    seed: int
    steps: int = 25
    guidance: float = 4.0  # 1 draws without the pass for no caption
    solver: str = "ddim"  # of solvers.SOLVERS
    negative_prompt: str | None = None  # None leads away from what the model takes for no caption
    width_px: int | None = None  # None is the model's own
    height_px: int | None = None


class SteppedModel:
    """A pipeline whose parts are called one by one. For one thread, but `decode`, which touches the autoencoder alone."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline, self.family = pipeline, family_of(pipeline)
        self.autoencoder = self.family.autoencoder(pipeline)
        self.unet = pipeline.unet.eval()
        self.device, self.dtype = self.unet.device, self.unet.dtype
        self.is_told_sizes = is_micro_conditioned(self.unet)
        self.size_px = self.family.size_px(pipeline)
        self._texts: OrderedDict[str | None, TextFeatures] = OrderedDict()

    def table(self, drawing: Drawing) -> SolverTable:
        """The drawing's steps; RecipeError for what can't be."""
        return solver_table(drawing.solver, self.pipeline.scheduler.config, drawing.steps)

    def shape(self, drawing: Drawing) -> tuple[int, int, int]:
        """(C, h, w) of its latents; RecipeError for sides that the autoencoder doesn't divide."""
        height, width = drawing.height_px or self.size_px, drawing.width_px or self.size_px
        factor = self.autoencoder.downsampling
        if min(height, width) < factor or height % factor or width % factor:
            raise RecipeError(f"width and height must be multiples of {factor}, found {width} x {height}")
        return int(self.unet.config.in_channels), height // factor, width // factor

    def noise(self, drawing: Drawing) -> Tensor:
        """The latents before the first step, of its own seed alone."""
        generator = torch.Generator().manual_seed(drawing.seed)
        return torch.randn(self.shape(drawing), generator=generator).to(self.device, self.dtype)

    @torch.no_grad()
    def text(self, caption: str | None) -> TextFeatures:
        """Of one caption, or of none (B = 1); the newest are kept."""
        if caption not in self._texts:
            found = (
                self.family.unconditional(self.pipeline)
                if caption is None
                else self.family.features(self.pipeline, [caption])
            )
            pooled = None if found.pooled_BD is None else found.pooled_BD.to(self.device, self.dtype)
            self._texts[caption] = TextFeatures(found.tokens_BTD.to(self.device, self.dtype), pooled)
        self._texts.move_to_end(caption)
        while len(self._texts) > TEXTS_KEPT:
            self._texts.popitem(last=False)
        return self._texts[caption]

    @torch.no_grad()
    def answer(self, x: Tensor, t: Tensor, texts: list[TextFeatures]) -> Tensor:
        """What the U-Net says to rows (B, C, h, w) at steps (B,), each with its own text."""
        tokens = torch.cat([text.tokens_BTD for text in texts])
        ids = pooled = None
        if self.is_told_sizes:
            factor = self.autoencoder.downsampling
            ids = whole_picture_ids(x.shape[-2] * factor, x.shape[-1] * factor, len(x)).to(self.device)
            pooled = torch.cat([text.pooled_BD for text in texts if text.pooled_BD is not None])
        out: Tensor = self.unet(x, t, **conditions(TextFeatures(tokens, pooled), ids)).sample
        return out

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """(N, H, W, 3) uint8 of clean latents (N, C, h, w)."""
        images = self.autoencoder.decode(latents.to(self.autoencoder.dtype)).float()
        return ((images / 2 + 0.5).clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
