"""What scoring costs: from the seconds that a finished `scores` station measured to hours and dollars for any pool."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emu_ray.config import require_at_least
from emu_ray.errors import InputError

MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Dollars an hour; set yours, these are round figures of 2026 for rented machines."""

    cpu_core_hour: float = 0.04
    gpu_hour: float = 2.50


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """A machine of the cluster."""

    name: str = "g6.12xlarge"
    cpus: int = 48
    gpus: int = 4
    dollars_per_hour: float = 4.60  # an example; set what you pay

    def __post_init__(self) -> None:
        require_at_least(self, 1, "cpus")
        require_at_least(self, 0, "gpus")


@dataclass(frozen=True)
class StageCost:
    """One stage of the scoring pipeline, as it was measured."""

    stage: str
    rows: int
    seconds_per_million: float  # of its actors, summed
    images_per_s: float  # of one actor
    cpu_hours_per_million: float
    gpu_seconds_per_million: float
    dollars_per_million: float


def stage_costs(stages: Mapping[str, Mapping[str, float]], prices: Prices) -> list[StageCost]:
    """Of the `stages` in the extra of a `scores` manifest; stages that took no time are left out.

    An actor's GPU is counted for its share (`gpus`) during its own seconds only, not while it waits.
    """
    found = []
    for name, stage in stages.items():
        if not stage["rows"] or not stage["seconds"]:
            continue
        seconds = stage["seconds"] / stage["rows"] * MILLION
        cpu_hours, gpu_seconds = seconds * stage["cpus"] / 3600, seconds * stage["gpus"]
        dollars = cpu_hours * prices.cpu_core_hour + gpu_seconds / 3600 * prices.gpu_hour
        found.append(StageCost(name, int(stage["rows"]), seconds, MILLION / seconds, cpu_hours, gpu_seconds, dollars))
    return found


@dataclass(frozen=True)
class Plan:
    """Time and money for a pool on a cluster, and what that rests on."""

    images: int
    nodes: int
    hours: float
    dollars: float
    bottleneck: str  # "cpus" or "gpus"
    images_per_s: float
    assumptions: tuple[str, ...]


def plan(costs: list[StageCost], images: int, nodes: int, kind: NodeKind, efficiency: float = 0.8) -> Plan:
    """How long `nodes` machines take when their scarcer resource is busy a share `efficiency` of the time, 0 to 1.

    InputError for stages that use GPUs on machines that have none, and where nothing was measured.
    """
    if not costs:
        raise InputError("the scores tell no seconds of any stage: score a sample of the pool first")
    cpu_s = sum(c.cpu_hours_per_million for c in costs) * 3600 / MILLION * images
    gpu_s = sum(c.gpu_seconds_per_million for c in costs) / MILLION * images
    if gpu_s and not kind.gpus:
        raise InputError(f"the scores were measured with GPUs, a {kind.name} has none: give a kind with --node.gpus")
    by_cpu = cpu_s / (kind.cpus * nodes)
    by_gpu = gpu_s / (kind.gpus * nodes) if gpu_s else 0.0
    hours = max(by_cpu, by_gpu) / efficiency / 3600
    return Plan(
        images=images,
        nodes=nodes,
        hours=hours,
        dollars=hours * nodes * kind.dollars_per_hour,
        bottleneck="gpus" if by_gpu > by_cpu else "cpus",
        images_per_s=images / (hours * 3600) if hours else math.inf,
        assumptions=(
            f"a {kind.name}: {kind.cpus} cores, {kind.gpus} GPUs, {kind.dollars_per_hour:.2f} $ an hour",
            f"its cores and GPUs are as fast as those that were measured, over {costs[0].rows:,} images of the same mix",
            f"the scarcer of the two is busy {efficiency:.0%} of the time; storage and network keep up",
            "starting the cluster, loading weights and selecting are not in it",
        ),
    )


def plan_table(plans: list[Plan]) -> str:
    """The plans below each other, for a terminal."""
    lines = [f"{'images':>16} {'nodes':>6} {'hours':>10} {'dollars':>12} {'images/s':>10}  bound by"]
    for p in plans:
        lines.append(
            f"{p.images:>16,} {p.nodes:>6,} {p.hours:>10,.1f} {p.dollars:>12,.0f} {p.images_per_s:>10,.0f}  {p.bottleneck}"
        )
    return "\n".join([*lines, "", "It rests on:", *(f"  - {a}" for a in plans[0].assumptions)])


def stages_of(extra: Mapping[str, Any], where: str) -> Mapping[str, Mapping[str, float]]:
    """The `stages` of a manifest's extra; InputError naming `where` when it has none."""
    if "stages" not in extra:
        raise InputError(f"{where} tells no seconds of its stages: it was written by an older version; score again")
    return extra["stages"]  # type: ignore[no-any-return]
