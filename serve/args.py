"""What `serve run`, a Serve config and `jobs.serve` may set."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emu_ray.errors import InputError


class LoraArgs(BaseModel):
    """An adapter that is served beside its base, whose memory it shares."""

    model_config = ConfigDict(extra="forbid")

    base: str  # the name of a model that is served whole
    checkpoint: str  # a folder with pytorch_lora_weights.safetensors
    scale: float = 1.0


class SafetyArgs(BaseModel):
    """Each picture is rated by curation's scorer before anybody sees it: a CLIP of open_clip, and one of two judges on it."""

    model_config = ConfigDict(extra="forbid")

    clip: str = "ViT-L-14"
    pretrained: str = "openai"
    clip_folder: str | None = None  # the project's own small model instead
    offensive_head: str | None = None
    safety_concepts: str | None = None  # the folder of a Stable Diffusion safety checker
    most: float = Field(default=0.5, ge=0, le=1)  # the highest rating that is shown

    @model_validator(mode="after")
    def _has_a_judge(self) -> SafetyArgs:
        if (self.offensive_head is None) == (self.safety_concepts is None):
            raise ValueError("safety needs either an offensive_head or safety_concepts")
        return self


class ServeArgs(BaseModel):
    """Checkpoints are `diffusers` folders: local, absolute, or `s3://`. Of three ways to name them at least one is used."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | None = None  # the model `tuned`
    base_checkpoint: str | None = None  # the model `base`: the pretrained one, to compare
    models: dict[str, str] = Field(default_factory=dict)  # others, by name
    loras: dict[str, LoraArgs] = Field(default_factory=dict)  # by name
    evaluation: str | None = None  # what `jobs.evaluate` wrote: the win rate that v1/models tells
    votes: str | None = None  # a folder for votes of blind comparisons, which are offered where it is named
    safety: SafetyArgs | None = None
    num_cpus: float = Field(default=1.0, ge=0)  # of each replica that draws
    num_gpus: float = Field(default=0.0, ge=0)  # above 0 the models are put on the GPU
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of U-Nets and text encoders
    cuda_graphs: bool = True  # on a GPU: passes are recorded and replayed, for the memory of the recordings
    models_each: int | None = Field(default=None, ge=1)  # in a replica's memory; None: all
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    encoder_replicas: int = Field(default=0, ge=0)  # that hold the text encoders, in place of those that draw
    keys_file: str | None = None  # of `python -m jobs.api_key`; None lets everybody ask
    seconds_ahead: float = Field(default=20.0, gt=0)  # of work for each replica before another is started
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    cold_start: Literal["wait", "refuse"] = "wait"  # while no replica runs: hold requests, or answer 503 and wake one
    max_together: int = Field(default=64, ge=1)  # requests that a replica works on at once, in shared passes
    max_waiting: int = Field(default=1000, ge=0)  # requests beyond those before new ones get 429
    timeout_s: float = Field(default=300.0, gt=0)  # of one request, and of a replica that is told to end

    @property
    def device(self) -> str:
        """torch's."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    @property
    def most_requests(self) -> int:
        """On their way at once."""
        return self.max_together * self.max_replicas + self.max_waiting

    def checkpoints(self) -> dict[str, str]:
        """Name of each whole model -> its folder; the first is the default. InputError for none, or a name that comes twice."""
        named = {"tuned": self.checkpoint, "base": self.base_checkpoint}
        found = {name: checkpoint for name, checkpoint in named.items() if checkpoint}
        if twice := sorted((found.keys() & self.models) | ((found | self.models).keys() & self.loras)):
            raise InputError(f"expected each model's name once, found {twice[0]!r} twice: rename one")
        found |= self.models
        if not found:
            raise InputError("expected a model to serve, found none: set checkpoint, or models")
        for name, lora in self.loras.items():
            if lora.base not in found:
                raise InputError(
                    f"the LoRA {name!r} is of the base {lora.base!r}, which isn't served: name one of {', '.join(found)}"
                )
        if self.max_replicas < self.min_replicas:
            raise InputError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return found
