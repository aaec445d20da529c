"""The solvers as tables of numbers, so that rows of one batch may be at different steps of different solvers.

Each of them is linear: with the latents x, the U-Net's answer, and the clean picture that it means,

    clean = clean_of_x * x + clean_of_out * answer
    next x = keep * x + lead * clean + past * (clean of the step before)

A request carries its table; a batch gathers one number a row. Noise levels and steps are asked of diffusers' own schedulers, whose updates
these are; the tests hold every row against them. DDIM: arXiv 2010.02502, eq. 12 without noise; Euler: arXiv 2206.00364, alg. 1 without churn;
DPM++ 2M: arXiv 2211.01095, alg. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from emu_ray.errors import RecipeError


@dataclass(frozen=True)
class SolverTable:
    """All steps of one request; each column (S,) float64."""

    t: np.ndarray  # what the U-Net is told
    scale: np.ndarray  # of the latents that it is given
    clean_of_x: np.ndarray
    clean_of_out: np.ndarray
    keep: np.ndarray
    lead: np.ndarray
    past: np.ndarray  # 0 in the first step
    noise: float  # standard deviation of the latents before the first step

    def __len__(self) -> int:
        return len(self.t)

    def numbers(self, device: torch.device | str = "cpu") -> Tensor:
        """(S, 7) float32, a row a step, in the order of `StepNumbers`."""
        columns = [getattr(self, name) for name in StepNumbers.__dataclass_fields__]
        return torch.from_numpy(np.stack(columns, axis=1)).float().to(device)


def solver_table(solver: str, config: Mapping[str, Any], steps: int) -> SolverTable:
    """The table of `solver`, a name of SOLVERS, for a model whose scheduler has this config.

    RecipeError for an unknown solver, for more steps than the model was trained with, or for a config that makes the update another one.
    """
    if solver not in SOLVERS:
        raise RecipeError(f"solver must be one of {', '.join(SOLVERS)}, found {solver!r}")
    trained = int(config["num_train_timesteps"])
    if not 1 <= steps <= trained:
        raise RecipeError(f"steps must be 1 to {trained}, found {steps}")
    for name in ("thresholding", "clip_sample", "use_flow_sigmas"):
        if config.get(name):
            raise RecipeError(
                f"{name} of a scheduler isn't linear in the latents, so its steps can't share a batch: set it to false"
            )
    if config.get("prediction_type") not in ("epsilon", "v_prediction"):
        raise RecipeError(f"prediction_type must be epsilon or v_prediction, found {config.get('prediction_type')!r}")
    return SOLVERS[solver](dict(config), steps)


def _clean(signal: np.ndarray, noise: np.ndarray, prediction: str) -> tuple[np.ndarray, np.ndarray]:
    """What x and the answer count in the clean picture, where x = signal * clean + noise * gaussian."""
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    return signal, -noise


def _ddim(config: dict[str, Any], steps: int) -> SolverTable:
    scheduler = DDIMScheduler.from_config({**config, "clip_sample": False})  # whose default suits pixels, not latents
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.numpy().astype(np.int64)
    product = scheduler.alphas_cumprod.double().numpy()
    before = t - scheduler.config.num_train_timesteps // steps
    now = product[t]
    then = np.where(before >= 0, product[np.maximum(before, 0)], float(scheduler.final_alpha_cumprod))
    signal, noise = np.sqrt(now), np.sqrt(1 - now)
    clean_of_x, clean_of_out = _clean(signal, noise, scheduler.config.prediction_type)
    keep = np.sqrt(1 - then) / noise
    return SolverTable(
        t=t.astype(np.float64), scale=np.ones(steps), clean_of_x=clean_of_x, clean_of_out=clean_of_out,
        keep=keep, lead=np.sqrt(then) - keep * signal, past=np.zeros(steps), noise=float(scheduler.init_noise_sigma),
    )  # fmt: skip


def _euler(config: dict[str, Any], steps: int) -> SolverTable:
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double().numpy()
    now, then = sigma[:-1], sigma[1:]
    # the latents are clean + sigma * gaussian here, and the U-Net is given them at variance 1
    scale = 1 / np.sqrt(now**2 + 1)
    clean_of_x, clean_of_out = _clean(scale, now * scale, scheduler.config.prediction_type)
    keep = then / now
    return SolverTable(
        t=scheduler.timesteps.double().numpy(), scale=scale, clean_of_x=clean_of_x * scale, clean_of_out=clean_of_out,
        keep=keep, lead=1 - keep, past=np.zeros(steps), noise=float(scheduler.init_noise_sigma),
    )  # fmt: skip


def _dpm(config: dict[str, Any], steps: int) -> SolverTable:
    scheduler = DPMSolverMultistepScheduler.from_config(
        {**config, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double().numpy()
    signal = 1 / np.sqrt(sigma**2 + 1)
    noise = sigma * signal
    with np.errstate(divide="ignore"):
        level = np.log(signal) - np.log(noise)  # half the logarithm of the signal-to-noise ratio; infinite at the end
    step = np.diff(level)
    clean_of_x, clean_of_out = _clean(signal[:-1], noise[:-1], scheduler.config.prediction_type)
    lead, past = signal[1:] * -np.expm1(-step), np.zeros(steps)
    is_zero_last = scheduler.config.euler_at_final or steps < 15 or scheduler.config.final_sigmas_type == "zero"
    for i in range(1, steps - 1 if is_zero_last else steps):
        correction = lead[i] * step[i] / (2 * step[i - 1])
        past[i] = -correction
        lead[i] += correction
    return SolverTable(
        t=scheduler.timesteps.double().numpy(), scale=np.ones(steps), clean_of_x=clean_of_x, clean_of_out=clean_of_out,
        keep=noise[1:] / noise[:-1], lead=lead, past=past, noise=float(scheduler.init_noise_sigma),
    )  # fmt: skip


SOLVERS: dict[str, Callable[[dict[str, Any], int], SolverTable]] = {"ddim": _ddim, "euler": _euler, "dpm++2m": _dpm}


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step of a batch: each (B,) but `t`, of which the U-Net takes float32 (B,) too."""

    t: Tensor
    scale: Tensor
    clean_of_x: Tensor
    clean_of_out: Tensor
    keep: Tensor
    lead: Tensor
    past: Tensor

    @classmethod
    def of(cls, rows: list[Tensor]) -> StepNumbers:
        """Of rows that are each at a step of their table, (7,) of `SolverTable.numbers`."""
        return cls(*torch.stack(rows, dim=1))

    def model_input(self, x: Tensor) -> Tensor:
        """What the U-Net is given of the latents (B, C, h, w)."""
        return x * _at_rows(self.scale, x)

    def advance(self, x: Tensor, out: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The next latents, and the clean picture that `out` means, which the next step takes as `before`."""
        clean = _at_rows(self.clean_of_x, x) * x + _at_rows(self.clean_of_out, x) * out
        return _at_rows(self.keep, x) * x + _at_rows(self.lead, x) * clean + _at_rows(self.past, x) * before, clean


def _at_rows(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)
