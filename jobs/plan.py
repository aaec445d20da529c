"""Says how long scoring takes and what it costs, for N images on M machines, from the rates that a scored sample measured.

reads    the manifest of ROOT/scores
writes   nothing; prints a table and what it rests on
command  python -m jobs.plan billion --root runs/sample; python -m jobs.plan billion --images 100000000 --nodes 4 8 16
cost     none
"""

from __future__ import annotations

from dataclasses import dataclass

from emu_ray.config import command_line, require_at_least
from emu_ray.curation.costs import NodeKind, Prices, plan, plan_table, stage_costs, stages_of
from emu_ray.errors import RecipeError
from emu_ray.stations import Station


@dataclass(frozen=True, kw_only=True)
class PlanRecipe:
    """How many images on which machines."""

    root: str  # whose ROOT/scores were measured
    images: int
    nodes: tuple[int, ...]  # numbers of machines to compare
    node: NodeKind = NodeKind()
    prices: Prices = Prices()
    efficiency: float = 0.8  # share of the time that the scarcer resource is busy

    def __post_init__(self) -> None:
        require_at_least(self, 1, "images")
        if not self.nodes or min(self.nodes) < 1:
            raise RecipeError(f"expected one or more numbers of nodes from 1, found {self.nodes}")
        if not 0 < self.efficiency <= 1:
            raise RecipeError(f"expected an efficiency above 0 and at most 1, found {self.efficiency}")


RECIPES = {
    "billion": PlanRecipe(root="runs/real", images=1_000_000_000, nodes=(8, 16, 32, 64)),
    "demo": PlanRecipe(
        root="runs/demo",
        images=1_000_000,
        nodes=(1, 4, 16),
        node=NodeKind(name="2-core", cpus=2, gpus=0, dollars_per_hour=0.1),
    ),
}


def run(recipe: PlanRecipe) -> None:
    """Print the measured stages and the table."""
    manifest = Station(f"{recipe.root.rstrip('/')}/scores").require("scores")
    costs = stage_costs(stages_of(manifest.extra, manifest.station), recipe.prices)
    print(f"measured over {manifest.rows:,} images at {manifest.station}, a million of them takes:")
    for c in costs:
        print(
            f"{c.stage:>12}: {c.cpu_hours_per_million:10.1f} core-hours {c.gpu_seconds_per_million:10.0f} GPU-seconds "
            f"{c.dollars_per_million:8.2f} $; an actor does {c.images_per_s:.1f} images/s"
        )
    print(plan_table([plan(costs, recipe.images, n, recipe.node, recipe.efficiency) for n in recipe.nodes]))


if __name__ == "__main__":
    command_line("plan", __doc__ or "", RECIPES, run)
