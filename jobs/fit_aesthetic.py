"""Fits an aesthetic head on people's votes, and says how well it ranks pictures whose votes it has not seen.

reads    ROOT/scores; --votes FILE.csv with the columns key, vote (0 to 10), or the votes in ROOT/chosen
writes   ROOT/heads/aesthetic/aesthetic.safetensors, for --clip.aesthetic-head of jobs.score
command  python -m jobs.fit_aesthetic csv --root runs/mine --votes votes.csv
cost     seconds; no image is opened
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.curation.fitting import FILE, FitAestheticRecipe, fit_aesthetic

RECIPES = {
    "csv": FitAestheticRecipe(root="runs/mine", votes="votes.csv"),
    "chosen": FitAestheticRecipe(root="runs/mine"),
}


def run(recipe: FitAestheticRecipe) -> None:
    """Fit and say how good it is."""
    manifest = fit_aesthetic(recipe)
    print(
        "aesthetic head: {pictures} pictures, {votes} votes; of {held_out} held out: rank correlation {spearman}, "
        "mean error {mean_error} ({mean_error_of_guessing} when always the mean is said)".format(**manifest.extra)
    )
    print(
        f"next: python -m jobs.select ... --root {recipe.root} --replace --aesthetic-head {manifest.station}/{FILE} "
        "--policy.min-aesthetic 5"
    )


if __name__ == "__main__":
    command_line("fit_aesthetic", __doc__ or "", RECIPES, run)
