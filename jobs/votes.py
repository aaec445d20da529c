"""Says who is preferred by the votes that people gave on the studio's page, where the sides are drawn by lot.

reads    the folder of votes, ROOT/votes unless told otherwise
writes   nothing
command  python -m jobs.votes studio --root runs/demo
cost     seconds; no Ray
"""

from __future__ import annotations

from dataclasses import dataclass

from emu_ray.config import command_line
from emu_ray.evaluation.votes import preferences, read_votes
from emu_ray.stations.folders import resolve


@dataclass(frozen=True, kw_only=True)
class VotesRecipe:
    """Which votes are counted."""

    root: str
    votes: str = "ROOT/votes"
    seed: int = 0  # of the bootstrap


RECIPES = {"studio": VotesRecipe(root="runs/demo")}


def run(recipe: VotesRecipe) -> None:
    """A line for each pair of models."""
    for (first, second), found in preferences(read_votes(resolve(recipe.votes, recipe.root)), seed=recipe.seed).items():
        low, high = found.ci95
        print(
            f"{first} against {second}: win {found.win:.1f}, tie {found.tie:.1f}, lose {found.lose:.1f} % of {found.n_pairs} votes on "
            f"{found.n_prompts} prompts (95 % interval of the win share {low:.1f} to {high:.1f}; sign test p {found.sign_test_p:.2g})"
        )


if __name__ == "__main__":
    command_line("votes", __doc__ or "", RECIPES, run)
