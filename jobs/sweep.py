"""Sweeps tuning-set size and steps from one base and cached latents, with Ray Tune, and writes a table and a plot.

reads    ROOT/latents/quality, ROOT/checkpoints/base
writes   ROOT/sweep: table.md, plot.png
command  python -m jobs.sweep demo
cost     demo: about 10 minutes on 2 cores
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.evaluation.prompts import haystack_prompts
from emu_ray.session.on_ray import connect
from emu_ray.stations import Station
from emu_ray.sweeps.on_ray import SweepRecipe, sweep
from jobs.quality_tune import RECIPES as TUNING

RECIPES = {
    "demo": SweepRecipe(root="runs/demo", tuning=TUNING["demo"].training, prompts=haystack_prompts(80)),
    "tiny": SweepRecipe(
        root="runs/demo", tuning=TUNING["demo"].training, prompts=haystack_prompts(8), sizes=(0, 30), steps=(2, 4)
    ),
}


def run(recipe: SweepRecipe) -> None:
    """Sweep and print the table."""
    connect(recipe.gpus_each)
    manifest = sweep(recipe)
    print(Station(manifest.station).get_bytes("table.md").decode())
    print(f"plot: {manifest.station}/plot.png")


if __name__ == "__main__":
    command_line("sweep", __doc__ or "", RECIPES, run)
