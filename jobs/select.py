"""Applies the selection policy to the scores and writes the station `selection`, with a reason for each rejected pair.

reads    ROOT/scores
writes   ROOT/selection: key, reject_reason, rank; the funnel stands in its manifest
command  python -m jobs.select demo; python -m jobs.select demo --root runs/x --policy.min-aesthetic 6
cost     no image is opened: seconds a million rows, mostly the search for duplicates
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.curation.duplicates import DuplicateBounds
from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.selecting import SelectRecipe, select

RECIPES = {
    "demo": SelectRecipe(
        root="runs/demo",
        policy=SelectionPolicy(
            min_short_side_px=60,
            max_aspect=2.0,
            max_offensive=0.5,
            max_text_words=1,
            max_text_area=0.03,
            min_clip_similarity=0.4,
            duplicates=DuplicateBounds(max_hash_bits=4, min_cosine=0.97),
            min_aesthetic=7.25,
        ),
    ),
    "stamps": SelectRecipe(
        root="runs/stamps",
        policy=SelectionPolicy(
            min_short_side_px=64,
            max_aspect=2.0,
            max_offensive=None,  # the small heads know haystacks only
            max_text_words=2,
            max_text_area=0.1,
            min_clip_similarity=None,
            duplicates=DuplicateBounds(max_hash_bits=6, min_cosine=0.95),
            min_aesthetic=None,
        ),
    ),
    "real": SelectRecipe(
        root="runs/real",
        policy=SelectionPolicy(max_offensive=None, min_aesthetic=None, max_share_per_concept=0.25, max_images=200_000),
    ),
}


def run(recipe: SelectRecipe) -> None:
    """Select and print the funnel."""
    manifest = select(recipe)
    for step in manifest.extra["funnel"]:
        print("{reason:>20}: {entered} in, {rejected} out; alone {total}, only it {unique}".format(**step))
    print(f"selection: {manifest.counts['kept']} of {manifest.counts['rows']} kept at {manifest.station}")


if __name__ == "__main__":
    command_line("select", __doc__ or "", RECIPES, run)
