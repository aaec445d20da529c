"""Every row of a batch of different solvers, lengths and steps moves as diffusers' own scheduler moves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import RecipeError
from emu_ray.generation.stepping.solvers import SOLVERS, SolverTable, StepNumbers, solver_table

THEIRS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++2m": DPMSolverMultistepScheduler}
OURS = dict(NoiseSchedule(ScheduleRecipe()).scheduler().config)
SD15 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
SD2 = {**SD15, "prediction_type": "v_prediction"}
CONFIGS = {"ours": OURS, "sd15": SD15, "sd2": SD2}


def answer(x: Tensor, t: float) -> Tensor:
    """A U-Net's stand-in: any function of what it is given."""
    return torch.tanh(x * 1.3 + t / 1000) + 0.1


def theirs(solver: str, config: dict[str, Any], steps: int, x: Tensor) -> list[Tensor]:
    """The latents after each step, by diffusers."""
    scheduler = THEIRS[solver].from_config(config)
    scheduler.set_timesteps(steps)
    x, seen = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        out = answer(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, t, x).prev_sample
        seen.append(x)
    return seen


def ours(tables: list[SolverTable], noise: Tensor, joins: list[int]) -> list[list[Tensor]]:
    """The latents after each step of each row, in batches of whoever is there: row i joins at round `joins[i]`."""
    state = [noise[i] * table.noise for i, table in enumerate(tables)]
    before = [torch.zeros_like(x) for x in state]
    at, seen = [0] * len(tables), [[] for _ in tables]
    for round_ in range(max(join + len(table) for join, table in zip(joins, tables, strict=True))):
        here = [i for i, table in enumerate(tables) if joins[i] <= round_ and at[i] < len(table)]
        if not here:
            continue
        numbers = StepNumbers.of([tables[i].numbers()[at[i]] for i in here])
        x = torch.stack([state[i] for i in here])
        given = numbers.model_input(x)
        out = torch.stack([answer(given[k], float(numbers.t[k])) for k in range(len(here))])
        moved, clean = numbers.advance(x, out, torch.stack([before[i] for i in here]))
        for k, i in enumerate(here):
            state[i], before[i] = moved[k], clean[k]
            seen[i].append(moved[k])
            at[i] += 1
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_all_solvers_and_lengths_in_one_batch_move_as_diffusers_moves_them(name: str) -> None:
    torch.manual_seed(0)
    asked = [(solver, steps) for solver in SOLVERS for steps in (1, 2, 7, 20, 50)]
    noise = torch.randn(len(asked), 4, 6, 5)
    tables = [solver_table(solver, CONFIGS[name], steps) for solver, steps in asked]
    found = ours(tables, noise, joins=[(3 * i) % 11 for i in range(len(asked))])
    for (solver, steps), row, table, own in zip(asked, noise, tables, found, strict=True):
        expected = theirs(solver, CONFIGS[name], steps, row)
        assert len(own) == len(expected) == steps
        for step, (a, b) in enumerate(zip(own, expected, strict=True)):
            # Euler adds and takes away numbers as large as its first noise, 4096 at zero terminal SNR, in float32; the table doesn't
            atol = 2e-5 * max(1.0, float(b.abs().max())) + 3e-7 * table.noise
            assert torch.allclose(a, b, atol=atol, rtol=2e-4), (solver, steps, step)


@pytest.mark.parametrize(
    ("solver", "changes", "steps", "said"),
    [
        ("heun", {}, 5, "solver must be one of ddim, euler, dpm\\+\\+2m, found 'heun'"),
        ("ddim", {}, 0, "steps must be 1 to 1000, found 0"),
        ("ddim", {}, 1001, "steps must be 1 to 1000, found 1001"),
        ("ddim", {"clip_sample": True}, 5, "clip_sample of a scheduler isn't linear"),
        ("ddim", {"prediction_type": "sample"}, 5, "prediction_type must be epsilon or v_prediction, found 'sample'"),
    ],
)
def test_what_can_not_share_a_batch_is_refused(solver: str, changes: dict[str, Any], steps: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        solver_table(solver, {**OURS, **changes}, steps)
