"""Writes the `selection` station: applies a policy to the scores of a pool, no images and no Ray.

The scores pass once, batch by batch; 40 bytes a row stay (`row_rules.py`). Then copies are sought in the whole pool,
the embeddings of the rows that stand in a candidate pair are read in a second pass, and everything else is arithmetic
on arrays. Time is linear in the rows as long as the number of hash orders stays (`copies.orders`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from emu_ray.config import fingerprint, from_json, require_at_least, to_json
from emu_ray.curation.audit import MEASURED_BY, audit
from emu_ray.curation.copies import RunAll, one_after_another
from emu_ray.curation.costs import Prices
from emu_ray.curation.deciding import NAMES, Decision, FunnelStep, decide_facts, embedding_matrix, funnel
from emu_ray.curation.policy import REASONS, SelectionPolicy
from emu_ray.curation.row_batches import ValueRange, column_names, float_rows, row_batches, value_ranges
from emu_ray.curation.row_rules import RowFacts, check_columns, columns_to_read, ranking_score
from emu_ray.curation.score_charts import ScoreCharts
from emu_ray.errors import InputError, StationConflictError, StationError
from emu_ray.stations import Manifest, Station

if TYPE_CHECKING:
    from emu_ray.curation.heads import LinearHead

ROWS_PER_PART = 1 << 20
ROWS_RATED_AT_ONCE = 1 << 14
EMBEDDING_BYTES = 256 << 20  # of candidates' embeddings held in memory; more go to a file in the temporary directory
CONCEPTS_TOLD = 1000  # in the manifest
SAY_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class SelectRecipe:
    """The policy to apply: ROOT/scores -> ROOT/selection."""

    root: str
    policy: SelectionPolicy = SelectionPolicy()
    aesthetic_head: str | None = (
        None  # a file; applied to the scores' embeddings, instead of their own aesthetic scores
    )
    replace: bool = field(default=False, metadata={"affects_result": False})  # remove another policy's ROOT/selection
    workers: int = field(default=1, metadata={"affects_result": False})
    # tasks that seek copies at once, on Ray, in pools above a million rows; 1 seeks them in this process

    prices: Prices = field(default=Prices(), metadata={"affects_result": False})  # of the report's costs

    def __post_init__(self) -> None:
        require_at_least(self, 1, "workers")


@dataclass(frozen=True)
class Judged:
    """A whole pool under a policy."""

    facts: RowFacts
    decision: Decision
    extra: dict[str, Any]  # of the selection's manifest


def select(recipe: SelectRecipe, run_all: RunAll = one_after_another) -> Manifest:
    """Write ROOT/selection, one row for each scored pair, sorted by key, in parts of ROWS_PER_PART.

    Columns: key, reject_reason ("" = kept), rank, and `duplicate_of`, the key of the picture kept instead of a
    duplicate. The manifest's counts: rows, kept, and the rows of each reject reason. Its extra: "funnel", a list of
    steps with `reason`, `entered`, `rejected`, `total`, `unique`; "concepts"; "copies", what the search did;
    "histograms" and "examples" of `ScoreCharts`. `run_all` runs the pieces of the search for copies.

    Raises InputError when nothing was kept, RecipeError when the policy bounds what nobody measured, StationError when
    the counts don't add up.
    """
    base = recipe.root.rstrip("/")
    scores, selection = Station(f"{base}/scores"), Station(f"{base}/selection")
    inputs = {"scores": scores.require("scores").fingerprint}
    head = _head(recipe)
    if head is not None:
        inputs["aesthetic_head"] = head.digest()
    if not _begun(selection, recipe, inputs):
        manifest = selection.require("selection")
        print(f"{selection.uri}: finished before, {manifest.counts['kept']} kept; nothing to do", flush=True)
        return manifest
    judged = judge(scores, recipe.policy, run_all, head)
    rows, steps = len(judged.facts), funnel(judged.decision)
    counts = checked_counts(rows, judged.decision.codes, steps)
    if not counts["kept"]:
        worst = max(steps, key=lambda s: s.rejected)
        raise InputError(
            f"the policy keeps none of the {rows} pairs of {scores.uri} ({worst.rejected} fail "
            f"{worst.reason!r}): loosen its bounds"
        )
    for index, table in enumerate(selection_tables(judged)):
        selection.write_table(f"part-{index:05d}.parquet", table)
    return selection.finish(rows=rows, counts=counts, extra={"funnel": [asdict(s) for s in steps], **judged.extra})


def _begun(selection: Station, recipe: SelectRecipe, inputs: dict[str, str]) -> bool:
    """`Station.begin`, after another policy's selection was removed where the recipe says so."""
    identity = fingerprint(recipe), to_json(recipe), "selection", inputs
    try:
        return selection.begin(*identity)
    except StationConflictError as conflict:
        if not recipe.replace:
            raise StationConflictError(f"{conflict}; --replace removes it") from None
        selection.remove()
        return selection.begin(*identity)


def judge(
    scores: Station,
    policy: SelectionPolicy,
    run_all: RunAll = one_after_another,
    head: LinearHead | None = None,
) -> Judged:
    """The decision over all rows of a finished `scores` station, in the order of its parts; nothing is written.

    `head` rates the stored embeddings; without it the scores' own aesthetic scores count.
    """
    started = time.monotonic()
    available, rows = column_names(scores), scores.require("scores").rows or 0
    check_columns(available, policy)
    columns = columns_to_read(available, policy)
    ranges = value_ranges(scores, columns)
    tables = row_batches(scores, columns)
    if head is not None:
        tables, ranges["aesthetic"] = _rated_anew(scores, columns, head), ValueRange(0.0, 10.0)
    charts = ScoreCharts(columns, policy, ranges)

    def parts() -> Iterator[RowFacts]:
        for table in tables:
            facts = RowFacts.of(table, policy, ranking_score(ranges))
            charts.add(table, facts)
            yield facts

    facts = RowFacts.joined(parts(), rows)
    print(f"select: read the scores of {rows} pairs in {time.monotonic() - started:.1f} s", flush=True)
    decision, copies = decide_facts(facts, policy, _EmbeddingsOf(scores), _saying(run_all))
    print(f"select: decided after {time.monotonic() - started:.1f} s", flush=True)
    extra = {
        "concepts": [asdict(c) for c in decision.concepts[:CONCEPTS_TOLD]],
        "copies": copies,
        "histograms": charts.histograms(),
        "examples": charts.examples(),
    }
    return Judged(facts, decision, extra)


def checked_counts(rows: int, codes: np.ndarray, steps: list[FunnelStep]) -> dict[str, int]:
    """The manifest's counts; StationError unless each row was kept or has exactly one reason."""
    kept = int(np.count_nonzero(codes == 0))
    counts = {"rows": rows, "kept": kept, **{s.reason: s.rejected for s in steps}}
    told = kept + sum(s.rejected for s in steps)
    if told != rows:
        raise StationError(f"expected a decision on each of {rows} pairs, found {told}: nothing was written")
    return counts


def selection_tables(judged: Judged, rows_per_part: int = ROWS_PER_PART) -> Iterator[pa.Table]:
    """The `selection` rows, sorted by key; rank is null where a bound failed."""
    key, decision = judged.facts.key, judged.decision
    order = np.argsort(key, kind="stable")
    names = pa.array(NAMES.tolist(), pa.string())
    for start in range(0, len(order), rows_per_part):
        rows = order[start : start + rows_per_part]
        codes, rank = decision.codes[rows], decision.rank[rows]
        is_copy = codes == 1 + REASONS.index("duplicate")
        kept_instead = key[rows] if decision.keeper is None else key[decision.keeper[rows]]
        yield pa.table(
            {
                "key": key[rows],
                "reject_reason": pa.DictionaryArray.from_arrays(pa.array(codes), names).cast(pa.string()),
                "rank": pa.array(rank, pa.float64(), mask=np.isnan(rank)),
                "duplicate_of": pa.array(kept_instead, pa.int64(), mask=~is_copy),
            }
        )


def audit_root(root: str) -> dict[str, dict[str, float | int | None]]:
    """Defect -> precision, recall and their counts of the filters that made ROOT/selection; see `audit`.

    The pool's column `truth` is the judge; SchemaError when the pool has none.
    """
    base = root.rstrip("/")
    manifest = Station(f"{base}/selection").require("selection")
    recipe = from_json(SelectRecipe, json.dumps(manifest.recipe))
    scores = Station(f"{base}/scores")
    judged = judge(scores, recipe.policy, head=_head(recipe))
    measured = scores.read_table(["key", *sorted(set(MEASURED_BY.values()))])
    truth = Station(f"{base}/pool").read_table(["key", "truth"]).sort_by("key")["truth"].to_pylist()
    by_key = np.argsort(judged.facts.key, kind="stable")
    in_order: list[str] = [""] * len(truth)
    for row, text in zip(by_key.tolist(), truth, strict=True):
        in_order[row] = text
    found = audit(in_order, measured, judged.decision)
    return {defect: one.to_plain() for defect, one in found.items()}


def _head(recipe: SelectRecipe) -> LinearHead | None:
    if recipe.aesthetic_head is None:
        return None
    from emu_ray.curation.heads import load_head  # loads torch, which a selection without a head needn't wait for

    return load_head(recipe.aesthetic_head, "score")


def _rated_anew(scores: Station, columns: list[str], head: LinearHead) -> Iterator[pa.Table]:
    """`row_batches` whose aesthetic scores are those of `head` on the stored embeddings."""
    import torch

    for table in row_batches(scores, [*columns, "embedding"], ROWS_RATED_AT_ONCE):
        values, embeddings = np.full(len(table), np.nan, np.float32), embedding_matrix(table["embedding"])
        if embeddings is not None:
            if embeddings.shape[1] != head.width:
                raise InputError(
                    f"the aesthetic head is for embeddings of {head.width} numbers, those of {scores.uri} have "
                    f"{embeddings.shape[1]}: take a head that was fitted on this CLIP"
                )
            with torch.no_grad():
                values = head(torch.from_numpy(embeddings)).numpy()
        rated = pa.array(values, pa.float32(), mask=np.isnan(values))
        place = table.schema.get_field_index("aesthetic")
        yield table.drop_columns(["embedding"]).set_column(place, "aesthetic", rated)


def _saying(run_all: RunAll) -> RunAll:
    """`run_all` that prints how far it is."""

    def run(function: Callable[[Any, Any], Any], shared: Any, pieces: Sequence[Any]) -> Iterator[Any]:
        said = time.monotonic()
        for done, result in enumerate(run_all(function, shared, pieces), 1):
            if time.monotonic() - said > SAY_EVERY_S:
                print(f"select: {done} of {len(pieces)} pieces of the hashes searched for copies", flush=True)
                said = time.monotonic()
            yield result

    return run


class _EmbeddingsOf:
    """The `EmbeddingsOf` of a `scores` station: one pass over its parts, without the row groups that hold none."""

    def __init__(self, scores: Station) -> None:
        self.scores = scores

    def __call__(self, rows: np.ndarray) -> np.ndarray | None:
        """float32 rows; above EMBEDDING_BYTES in an unnamed file of the temporary directory, which the kernel pages."""
        matrix: np.ndarray | None = None
        done = 0
        for values in float_rows(self.scores, "embedding", np.asarray(rows, np.int64)):
            some = embedding_matrix(values)
            if some is not None:
                if matrix is None:
                    matrix = _room((len(rows), some.shape[1]))
                    matrix[:done] = np.nan
                matrix[done : done + len(some)] = some
            elif matrix is not None:
                matrix[done : done + len(values)] = np.nan
            done += len(values)
        return matrix


def _room(shape: tuple[int, int]) -> np.ndarray:
    if 4 * shape[0] * shape[1] <= EMBEDDING_BYTES:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="emu_ray-embeddings-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
