"""Writes the `selection` station: applies a policy to the scores of a pool, no images and no Ray."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from emu_ray.config import fingerprint, from_json, to_json
from emu_ray.curation.audit import audit
from emu_ray.curation.policy import KEPT, Decision, SelectionPolicy, decide, funnel
from emu_ray.errors import InputError
from emu_ray.stations import Manifest, Station


@dataclass(frozen=True, kw_only=True)
class SelectRecipe:
    """The policy to apply: ROOT/scores -> ROOT/selection."""

    root: str
    policy: SelectionPolicy = SelectionPolicy()


def select(recipe: SelectRecipe) -> Manifest:
    """Write ROOT/selection, one row for each scored pair, sorted by key.

    The manifest's counts: rows, kept, and the rows of each reject reason; its extra has the "funnel", a list of steps
    with `reason`, `entered`, `rejected`, `total`, `unique`. All scores lie in memory once. Raises InputError when
    nothing was kept, RecipeError when the policy bounds what nobody measured.
    """
    base = recipe.root.rstrip("/")
    scores, selection = Station(f"{base}/scores"), Station(f"{base}/selection")
    inputs = {"scores": scores.require("scores").fingerprint}
    if not selection.begin(fingerprint(recipe), to_json(recipe), "selection", inputs):
        manifest = selection.require("selection")
        print(f"{selection.uri}: finished before, {manifest.counts['kept']} kept; nothing to do", flush=True)
        return manifest
    table = scores.read_table().sort_by("key")
    decision = decide(table, recipe.policy)
    kept = int((decision.reasons == KEPT).sum())
    steps = funnel(decision)
    counts = {"rows": len(table), "kept": kept, **{s.reason: s.rejected for s in steps}}
    if not kept:
        worst = max(steps, key=lambda s: s.rejected)
        raise InputError(
            f"the policy keeps none of the {len(table)} pairs of {scores.uri} ({worst.rejected} fail "
            f"{worst.reason!r}): loosen its bounds"
        )
    selection.write_table("part-00000.parquet", selection_table(table, decision))
    return selection.finish(rows=len(table), counts=counts, extra={"funnel": [asdict(s) for s in steps]})


def selection_table(scores: pa.Table, decision: Decision) -> pa.Table:
    """The `selection` rows of a decision over `scores`; rank is null where a bound failed."""
    unranked = np.isnan(decision.rank)
    return pa.table(
        {
            "key": scores["key"],
            "reject_reason": pa.array(decision.reasons.tolist(), pa.string()),
            "rank": pa.array(decision.rank, pa.float32(), mask=unranked),
        }
    )


def audit_root(root: str) -> dict[str, dict[str, float | int | None]]:
    """Defect -> precision, recall and their counts of the filters that made ROOT/selection; see `audit`.

    The pool's column `truth` is the judge; SchemaError when the pool has none.
    """
    base = root.rstrip("/")
    manifest = Station(f"{base}/selection").require("selection")
    policy = from_json(SelectRecipe, json.dumps(manifest.recipe)).policy
    scores = Station(f"{base}/scores").read_table().sort_by("key")
    truth = Station(f"{base}/pool").read_table(["key", "truth"]).sort_by("key")["truth"].to_pylist()
    found = audit(truth, scores, decide(scores, policy))
    return {defect: one.to_plain() for defect, one in found.items()}
