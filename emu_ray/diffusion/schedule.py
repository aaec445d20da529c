"""The forward process and the training targets of a discrete-time diffusion model.

Emu does not state its schedule or prediction type; the betas are those of a sibling paper of the same group (scaled-linear,
8.5e-4 to 1.2e-2, 1000 steps), v-prediction with zero terminal SNR as that paper uses at 512 px. ARCHITECTURE.md tells what is the paper's and what is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from emu_ray.config import require_at_least
from emu_ray.errors import InputError, RecipeError

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    """Noise schedule and objective.

    `min_snr_gamma=None` weights all steps alike. That is the default beside zero terminal SNR, where min-SNR would give the last step, at
    which sampling begins, a weight of exactly 0 and all strongly noised ones, at which shapes are decided, next to none.
    """

    train_steps: int = 1000
    beta_start: float = 8.5e-4
    beta_end: float = 1.2e-2
    zero_terminal_snr: bool = True
    prediction: Prediction = "v_prediction"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError for what is undefined, epsilon prediction at zero terminal SNR among it: its last step has no signal to predict from."""
        require_at_least(self, 2, "train_steps")
        if not 0 < self.beta_start < self.beta_end < 1:
            raise RecipeError(
                f"betas of ScheduleRecipe must rise between 0 and 1, found {self.beta_start} to {self.beta_end}"
            )
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise RecipeError(
                f"min_snr_gamma of ScheduleRecipe must be above 0, or be None, found {self.min_snr_gamma}"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise RecipeError(
                "zero_terminal_snr with prediction 'epsilon' is undefined at the last step (its SNR is 0): "
                "use prediction 'v_prediction' or zero_terminal_snr False"
            )


class NoiseSchedule:
    """q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I) for t in 0 .. train_steps - 1, and what the model learns at t."""

    def __init__(self, recipe: ScheduleRecipe) -> None:
        self.recipe = recipe
        betas = (
            torch.linspace(recipe.beta_start**0.5, recipe.beta_end**0.5, recipe.train_steps, dtype=torch.float64) ** 2
        )
        root = torch.cumprod(1 - betas, 0).sqrt()
        if recipe.zero_terminal_snr:  # Lin et al., arXiv 2305.08891, algorithm 1
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.signal = root.float()  # sqrt(abar_t), (T,)
        self.noise = (1 - root**2).sqrt().float()  # (T,)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t of the shape of `clean`, (B, ...); t is (B,) int64."""
        return _at(self.signal, t, clean) * clean + _at(self.noise, t, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should output for z_t: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) z_0 (arXiv 2202.00512)."""
        if self.recipe.prediction == "epsilon":
            return noise
        return _at(self.signal, t, clean) * noise - _at(self.noise, t, clean) * clean

    def weight(self, t: Tensor) -> Tensor:
        """(B,) loss weight by min-SNR-gamma (Hang et al., arXiv 2303.09556), or ones."""
        gamma = self.recipe.min_snr_gamma
        if gamma is None:
            return torch.ones(t.shape, device=t.device)
        snr = (self.signal.to(t.device)[t] / self.noise.to(t.device)[t]) ** 2
        clipped = snr.clamp(max=gamma)
        return clipped / (snr + 1) if self.recipe.prediction == "v_prediction" else clipped / snr

    def scheduler(self) -> DDIMScheduler:
        """The sampler-side twin in diffusers' own class, saved with the pipeline."""
        return DDIMScheduler(
            num_train_timesteps=self.recipe.train_steps,
            beta_start=self.recipe.beta_start,
            beta_end=self.recipe.beta_end,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,  # trailing steps don't use it, and StableDiffusionPipeline warns of any other
            prediction_type=self.recipe.prediction,
            rescale_betas_zero_snr=self.recipe.zero_terminal_snr,
            timestep_spacing="trailing",
        )


def schedule_of(config: Mapping[str, Any], where: str) -> ScheduleRecipe:
    """What a base was trained with, by the complete config of its diffusers scheduler; how sampling spaces its steps is no part of it.

    Raises InputError for what we can't train: other betas than scaled-linear, prediction of the sample itself, flow matching.
    """
    for name, wanted in (("beta_schedule", ("scaled_linear",)), ("prediction_type", ("epsilon", "v_prediction"))):
        if config.get(name) not in wanted:
            raise InputError(
                f"{where}: expected {name} {' or '.join(wanted)}, found {config.get(name)!r}: such a base is not supported"
            )
    if config.get("trained_betas") is not None or config.get("use_flow_sigmas"):
        raise InputError(
            f"{where}: expected the betas of a formula, found trained_betas or use_flow_sigmas: such a base is not supported"
        )
    return ScheduleRecipe(
        train_steps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        prediction=config["prediction_type"],
    )


def offset_noise(noise: Tensor, per_channel: Tensor, strength: float) -> Tensor:
    """`noise` (B, C, H, W) plus strength x a constant per sample and channel, `per_channel` (B, C) standard normal.

    Emu states 0.02 in the last stage of pretraining and 0.1 in quality-tuning (arXiv 2309.15807, sections 3.1 and 3.3).
    """
    return noise + strength * per_channel[:, :, None, None]


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device)[t].view(-1, *([1] * (like.ndim - 1))).to(like.dtype)
