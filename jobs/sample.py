"""Draws pictures of held-out prompts with a checkpoint; the same prompts and seeds for every run.

reads    a checkpoint
writes   ROOT/samples/RUN, and a contact sheet of the first pictures
command  python -m jobs.sample demo-tuned
cost     demo: 0.1 CPU-seconds a picture of 20 steps
"""

from __future__ import annotations

import io

from emu_ray.config import command_line
from emu_ray.evaluation.prompts import haystack_prompts
from emu_ray.generation import SamplingSettings
from emu_ray.generation.on_ray import SampleRecipe, sample
from emu_ray.generation.samples import contact_sheet, from_png
from emu_ray.session.on_ray import connect
from emu_ray.stations import Station

STAMP_PROMPTS = (
    "apple", "cat", "dog", "flower", "fish", "tree", "bird", "horse", "butterfly", "car", "house", "strawberry",
    "elephant", "boat", "rose", "duck",
)  # fmt: skip
# Without guidance each model shows its own distribution, which is what tuning changes; guidance draws the pretrained one towards
# clear pictures too, and so hides a part of the effect: EXPERIMENTS.md has the comparison at 1, 1.5, 2 and 3.
DEMO = SamplingSettings(steps=20, guidance=1.0)
STAMPS = SamplingSettings(steps=20, guidance=3.0)

RECIPES = {
    f"demo-{run}": SampleRecipe(
        root="runs/demo", run=run, checkpoint=f"ROOT/checkpoints/{run}", prompts=haystack_prompts(240), settings=DEMO
    )
    for run in ("base", "tuned")
} | {
    f"stamps-{run}": SampleRecipe(
        root="runs/stamps", run=run, checkpoint=f"ROOT/checkpoints/{run}", prompts=STAMP_PROMPTS, settings=STAMPS
    )
    for run in ("base", "tuned")
}
# Prompts are yours: --prompts-file.
RECIPES |= {
    f"{base}-{run}": SampleRecipe(
        root=f"runs/{base}", run=run, checkpoint=f"ROOT/{place}", batch_size=4, actors=1, num_cpus=4, num_gpus=1
    )
    for base in ("sd15", "sdxl")
    for run, place in (("base", "start"), ("tuned", "checkpoints/tuned"), ("lora", "checkpoints/lora"))
}


def run(recipe: SampleRecipe) -> None:
    """Draw, and lay the first pictures out as one."""
    connect(recipe.num_gpus)
    manifest = sample(recipe)
    station = Station(f"{recipe.root}/samples/{recipe.run}")
    images = from_png(station.read_table(["image"])["image"].to_pylist()[:48])
    sheet = io.BytesIO()
    contact_sheet(images, 8).save(sheet, "PNG")
    Station(recipe.root).put_file(f"samples-{recipe.run}.png", sheet.getvalue())
    print(f"samples/{recipe.run}: {manifest.rows} pictures; {recipe.root}/samples-{recipe.run}.png shows {len(images)}")


if __name__ == "__main__":
    command_line("sample", __doc__ or "", RECIPES, run)
