"""Which schedulers of diffusers a base may come with, and how one is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from emu_ray.errors import InputError
from emu_ray.models.hub import read_json

# Samplers of one discrete forward process; distilled (LCM, TCD), continuous (EDM) and flow matching ones are other objectives.
SCHEDULERS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    }
)


def read_scheduler(folder: Path) -> Any:
    """The scheduler that the folder's config names; InputError for a class that is not among SCHEDULERS."""
    config = read_json(folder / "scheduler_config.json")
    return scheduler_from(config, f"{folder}/scheduler_config.json")


def scheduler_from(config: Mapping[str, Any], where: str) -> Any:
    """The same from the config itself; what it leaves out gets the class's own defaults, as in diffusers."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise InputError(
            f"{where}: expected one of {', '.join(sorted(SCHEDULERS))}, found {name!r}: such a base is not supported"
        )
    return getattr(diffusers, name).from_config(dict(config))
