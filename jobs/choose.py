"""Takes people's choice from the selection and writes the station `chosen`, images and captions.

reads    ROOT/selection, ROOT/pool; recipe csv: --choices FILE.csv with the columns key, caption (and annotator)
writes   ROOT/chosen
command  python -m jobs.choose demo; python -m jobs.choose csv --root runs/mine --choices mine.csv
cost     reads the pool once; seconds
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.curation.choosing import ChooseRecipe, choose

RECIPES = {
    "demo": ChooseRecipe(root="runs/demo", annotator="simulated", error_rate=0.05, seed=701, max_images=300),
    "stamps": ChooseRecipe(root="runs/stamps", annotator="take_top"),
    "real": ChooseRecipe(root="runs/real", annotator="csv", max_images=2000),
    "csv": ChooseRecipe(root="runs/mine", annotator="csv"),
}


def run(recipe: ChooseRecipe) -> None:
    """Choose and say who chose."""
    manifest = choose(recipe)
    who = ", ".join(f"{name} {value}" for name, value in manifest.extra.items())
    counts = manifest.counts
    print(f"chosen: {counts['rows']} of {counts['candidates']} candidates ({who}) at {manifest.station}")


if __name__ == "__main__":
    command_line("choose", __doc__ or "", RECIPES, run)
