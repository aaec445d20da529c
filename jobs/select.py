"""Applies the selection policy to the scores and writes the station `selection`, with a reason for each rejected pair.

reads    ROOT/scores
writes   ROOT/selection: key, reject_reason, rank, duplicate_of; ROOT/funnel.html: counts, histograms, pictures around each bound, costs
command  python -m jobs.select demo; python -m jobs.select demo --replace --policy.min-aesthetic 6
         python -m jobs.select real --policy.concept-quotas portrait 5000 "*" 1000 --workers 8
cost     no image is opened but those that the page shows; ten million pairs with embeddings of 16 numbers: 46 CPU-seconds
         and 1.6 GB in one process (benchmarks/selection.py), half of it the search for copies, which `--workers` spreads
         over a Ray cluster; wider embeddings cost their reading
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emu_ray.config import command_line
from emu_ray.curation.copies import RunAll, one_after_another
from emu_ray.curation.duplicates import DuplicateBounds
from emu_ray.curation.funnel_report import write_report
from emu_ray.curation.policy import SelectionPolicy
from emu_ray.curation.selecting import SelectRecipe, select
from emu_ray.stations import Station

WORTH_A_CLUSTER_ROWS = 1_000_000  # below, starting Ray takes longer than the search

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
    "real": SelectRecipe(  # an aesthetic bound needs a head: jobs.fit_aesthetic, or LAION's published one
        root="runs/real",
        policy=SelectionPolicy(
            max_watermark=0.8,
            min_aesthetic=None,
            min_photography=0.4,
            likes_weight=0.2,
            max_share_per_concept=0.25,
            max_images=200_000,
        ),
    ),
    "folder": SelectRecipe(
        root="runs/folder",
        policy=SelectionPolicy(
            min_short_side_px=256,
            max_aspect=2.5,
            needs_caption=False,
            max_text_words=5,
            max_text_area=0.1,
            min_clip_similarity=None,
            min_aesthetic=None,
            min_photography=0.4,
        ),
    ),
}


def run(recipe: SelectRecipe) -> None:
    """Select and print the funnel, and what is missing of the quotas."""
    manifest = select(recipe, runner(recipe))
    for step in manifest.extra["funnel"]:
        print("{reason:>20}: {entered} in, {rejected} out; alone {total}, only it {unique}".format(**step))
    for concept in manifest.extra.get("concepts", ()):
        if concept["shortfall"]:
            print("{concept}: {wanted} wanted, {kept} kept of {candidates} candidates".format(**concept))
    print(f"selection: {manifest.counts['kept']} of {manifest.counts['rows']} kept at {manifest.station}")
    print(f"funnel: {write_report(recipe.root, recipe.prices)}")


def runner(recipe: SelectRecipe) -> RunAll:
    """This process, or Ray where the recipe wants workers and the pool is worth it."""
    scores = Station(f"{recipe.root.rstrip('/')}/scores").manifest()
    if recipe.workers == 1 or scores is None or (scores.rows or 0) < WORTH_A_CLUSTER_ROWS:
        return one_after_another
    from emu_ray.session.on_ray import connect

    connect()
    return on_ray(recipe.workers)


def on_ray(workers: int) -> RunAll:
    """Runs pieces as Ray Data tasks, at most `workers` at once; what they share is put into the object store once.

    A node fetches it once and all its tasks read the same memory.
    """
    import ray
    import ray.data

    def run_all(function: Callable[[Any, Any], Any], shared: Any, pieces: Sequence[Any]) -> Iterator[Any]:
        reference = ray.put(shared)

        def run_one(row: dict[str, Any]) -> dict[str, Any]:
            return {"result": pickle.dumps(function(ray.get(reference), pickle.loads(row["piece"])))}

        if not pieces:
            return iter(())
        items = [{"piece": pickle.dumps(piece)} for piece in pieces]
        tasks = ray.data.from_items(items, override_num_blocks=len(items))
        done = tasks.map(run_one, compute=ray.data.TaskPoolStrategy(size=min(workers, len(items))))
        return (pickle.loads(row["result"]) for row in done.iter_rows())

    return run_all


if __name__ == "__main__":
    command_line("select", __doc__ or "", RECIPES, run)
