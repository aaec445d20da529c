"""A loaded pipeline of any family, as the engine uses it: texts, first noise, one pass of the U-Net, pictures."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from emu_ray.errors import InputError, RecipeError, first_line
from emu_ray.generation.families import family_of
from emu_ray.generation.stepping.recorded import RecordedPasses
from emu_ray.generation.stepping.solvers import SolverTable, solver_table
from emu_ray.generation.stepping.tickets import Drawing
from emu_ray.models.denoiser import conditions, is_micro_conditioned, whole_picture_ids
from emu_ray.models.text import TextFeatures

TEXTS_KEPT = 256  # prompts, each of a few hundred KB at most
TABLES_KEPT = 256  # of a solver and a number of steps
DEFAULT_SOLVER = "ddim"


class SteppedModel:
    """A pipeline whose parts are called one by one. For one thread, but `decode`, which touches the autoencoder alone, and `release`."""

    def __init__(self, pipeline: DiffusionPipeline, records_passes: bool = True) -> None:
        """`records_passes` replays passes of a GPU as CUDA graphs, which takes memory for the recordings."""
        self.pipeline, self.family = pipeline, family_of(pipeline)
        self.autoencoder = self.family.autoencoder(pipeline)
        self.unet = pipeline.unet.eval()
        self.device, self.dtype = self.unet.device, self.unet.dtype
        is_on_gpu = self.device.type == "cuda"
        self._recorded = RecordedPasses(self.unet, self.device) if is_on_gpu and records_passes else None
        # of `decode`'s own, so that neither it nor a pass queues behind the other
        self._decoding = torch.cuda.Stream(self.device) if is_on_gpu else None
        self.is_told_sizes = is_micro_conditioned(self.unet)
        self.size_px = self.family.size_px(pipeline)
        self._texts: OrderedDict[str | None, TextFeatures] = OrderedDict()
        config = self.pipeline.scheduler.config
        # diffusers takes milliseconds to make a scheduler
        self._table: Callable[[str, int], SolverTable] = functools.lru_cache(TABLES_KEPT)(
            lambda solver, steps: solver_table(solver, config, steps)
        )
        self._last_joined: tuple[list[TextFeatures], TextFeatures | None] = [], None
        device = self.device  # and not `self`, which would then live until the garbage collector finds it
        self._told_sizes: Callable[[int, int], Tensor] = functools.lru_cache(TABLES_KEPT)(
            lambda height, width: whole_picture_ids(height, width, 1).to(device)
        )
        self._loras: dict[str, float] = {}  # scale of each
        self._lora: str | None = None

    def add_lora(self, name: str, folder: Path, scale: float = 1.0) -> None:
        """Puts an adapter beside the U-Net's weights, at rest until `use`; InputError for one that doesn't fit or changes a text encoder."""
        loader, known_as = type(self.pipeline), _adapter(name)
        try:
            found = loader.lora_state_dict(
                folder, unet_config=self.unet.config, use_safetensors=True, local_files_only=True
            )
            weights, alphas = found[0], found[1]
        except Exception as error:  # diffusers and safetensors each raise their own
            raise InputError(
                f"{folder}: expected an adapter as pytorch_lora_weights.safetensors, found none: {first_line(error)}"
            ) from error
        if others := sorted({name.split(".")[0] for name in weights if not name.startswith("unet.")}):
            raise InputError(
                f"{folder}: expected an adapter of the U-Net alone, found one of {others[0]} too: not served"
            )
        try:
            with warnings.catch_warnings():  # several adapters are meant
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                self.unet.load_lora_adapter(weights, prefix="unet", network_alphas=alphas, adapter_name=known_as)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: the adapter doesn't fit this model's U-Net: {first_line(error)}") from error
        if known_as not in getattr(self.unet, "peft_config", {}):
            raise InputError(f"{folder}: expected weights of an adapter, found none for the U-Net")
        self._loras[name] = scale
        self.unet.eval().disable_lora()

    def use(self, lora: str | None) -> None:
        """What `answer` speaks with from now on: the U-Net, or the U-Net and one of its adapters."""
        if lora == self._lora:
            return
        if lora is None:
            self.unet.disable_lora()
        else:
            self.unet.enable_lora()
            self.unet.set_adapters([_adapter(lora)], [self._loras[lora]])
        self._lora = lora

    def table(self, drawing: Drawing) -> SolverTable:
        """The drawing's steps; RecipeError for what can't be."""
        if drawing.lora is not None and drawing.lora not in self._loras:
            raise RecipeError(
                f"expected one of the adapters {', '.join(self._loras) or '(none)'}, found {drawing.lora!r}"
            )
        return self._table(drawing.solver or DEFAULT_SOLVER, drawing.steps)

    def shape(self, drawing: Drawing) -> tuple[int, int, int]:
        """(C, h, w) of its latents; RecipeError for sides that the autoencoder doesn't divide."""
        height, width = drawing.height_px or self.size_px, drawing.width_px or self.size_px
        factor = self.autoencoder.downsampling
        if min(height, width) < factor or height % factor or width % factor:
            raise RecipeError(f"width and height must be multiples of {factor}, found {width} x {height}")
        return int(self.unet.config.in_channels), height // factor, width // factor

    def noise(self, drawing: Drawing) -> Tensor:
        """The latents before the first step, of its own seed alone; float32, whatever the U-Net computes in."""
        generator = torch.Generator().manual_seed(drawing.seed)
        return torch.randn(self.shape(drawing), generator=generator).to(self.device)

    @torch.inference_mode()
    def text(self, caption: str | None) -> TextFeatures:
        """Of one caption, or of none (B = 1); the newest are kept."""
        if caption not in self._texts:
            self._texts[caption] = self.as_told(text_features(self.pipeline, caption))
        self._texts.move_to_end(caption)
        while len(self._texts) > TEXTS_KEPT:
            self._texts.popitem(last=False)
        return self._texts[caption]

    def as_told(self, features: TextFeatures) -> TextFeatures:
        """On the U-Net's device and in its precision."""
        pooled = None if features.pooled_BD is None else features.pooled_BD.to(self.device, self.dtype)
        return TextFeatures(features.tokens_BTD.to(self.device, self.dtype), pooled)

    @property
    def is_settled(self) -> bool:
        """Whether the last pass took what passes of its size take from now on; the first ones on a GPU are launched, then recorded."""
        return self._recorded is None or not self._recorded.was_first

    def wait(self) -> None:
        """Until the device has done what this thread told it: a pass's time is not that of its launch."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def release(self) -> None:
        """Gives back what memory of the device its recorded passes hold. Whoever calls has a turn, so that no pass is made."""
        if self._recorded is not None:
            self._recorded.release()

    @torch.inference_mode()
    def answer(self, x: Tensor, t: Tensor, texts: list[TextFeatures]) -> Tensor:
        """What the U-Net says to rows (B, C, h, w) at steps (B,), each with its own text."""
        text = conditions(self._joined(texts), self._ids(x) if self.is_told_sizes else None)
        if self._recorded is not None:
            return self._recorded(self._lora, x.to(self.dtype), t, text).to(torch.float32, copy=True)
        out: Tensor = self.unet(x.to(self.dtype), t, **text).sample
        return out.float()

    def _ids(self, x: Tensor) -> Tensor:
        height, width = (side * self.autoencoder.downsampling for side in x.shape[-2:])
        return self._told_sizes(height, width).expand(len(x), -1)

    def _joined(self, texts: list[TextFeatures]) -> TextFeatures:
        """One after the other; kept until others come, since a batch stays together for many passes."""
        before, joined = self._last_joined
        if joined is None or len(before) != len(texts) or any(a is not b for a, b in zip(before, texts, strict=True)):
            pooled = [text.pooled_BD for text in texts if text.pooled_BD is not None]
            tokens = torch.cat([text.tokens_BTD for text in texts])
            joined = TextFeatures(tokens, torch.cat(pooled) if self.is_told_sizes else None)
            self._last_joined = texts, joined
        return joined

    @torch.inference_mode()
    def decode(self, latents: list[Tensor]) -> np.ndarray:
        """(N, H, W, 3) uint8 of clean latents, each (C, h, w); those of a pass that was waited for."""
        with torch.cuda.stream(self._decoding):  # nothing, on a CPU
            images = self.autoencoder.decode(torch.stack(latents).to(self.autoencoder.dtype)).float()
            return ((images / 2 + 0.5).clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _adapter(lora: str) -> str:
    """Its name for peft, which makes modules of it: one called `half` or `a.b` could not be added."""
    return f"lora_{lora.encode().hex()}"


@torch.no_grad()
def text_features(pipeline: DiffusionPipeline, caption: str | None) -> TextFeatures:
    """What the U-Net is told of one caption, or of none (B = 1); RecipeError for one that no encoder reads to its end."""
    family = family_of(pipeline)
    if caption is None:
        return family.unconditional(pipeline)
    tokenizers = [
        found for part in ("tokenizer", "tokenizer_2") if (found := getattr(pipeline, part, None)) is not None
    ]
    shortest = min(tokenizer.model_max_length for tokenizer in tokenizers)
    if len(caption.encode(errors="replace")) + 2 <= shortest:  # no token is less than a byte
        return family.features(pipeline, [caption])
    lengths = [(len(each(caption, verbose=False).input_ids), int(each.model_max_length)) for each in tokenizers]
    if all(found > most for found, most in lengths):
        found, most = min(lengths, key=lambda length: length[0] - length[1])
        raise RecipeError(
            f"this model reads {most} tokens of a prompt, and this one has {found}: say it in about {most * 3 // 4} words"
        )
    return family.features(pipeline, [caption])
