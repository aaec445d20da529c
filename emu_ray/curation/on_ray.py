"""Writes the `scores` station with Ray Data: cheap gates and CLIP in one actor pool, OCR in the next, wave after wave.

A wave is a number of the pool's Parquet files. Its scores (not its images) come to the driver, are checked to be
exactly the pool's rows, sorted by key and written; run again, only missing waves are scored.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from emu_ray.config import fingerprint, require_at_least, to_json
from emu_ray.curation.clip_scorer import ClipModel, check
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.pair_scorer import HardFloors, PairScorer, TextScorer
from emu_ray.errors import StationError
from emu_ray.records import conform
from emu_ray.stations import Manifest, Station
from emu_ray.stations.slices import Slice, cut, read_part, read_slice

READ_COLUMNS = ["key", "image", "caption", "width_px", "height_px", "likes"]
SAY_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """How many actors of a class run, and what each takes of the cluster."""

    actors: int = 1
    cpus: float = 1.0  # of each actor
    gpus: float = 0.0  # of each actor; a fraction shares a GPU, 0 runs on the CPU
    batch_size: int = 64  # pairs a call

    def __post_init__(self) -> None:
        require_at_least(self, 1, "actors", "batch_size")

    @property
    def device(self) -> str:
        """torch's name of the device an actor computes on."""
        return "cuda" if self.gpus > 0 else "cpu"


@dataclass(frozen=True, kw_only=True)
class ScoreRecipe:
    """What is measured, and on how much hardware."""

    root: str  # ROOT/pool -> ROOT/scores
    clip: ClipModel = ClipModel()
    ocr: OcrSettings = OcrSettings()
    floors: HardFloors = HardFloors()
    clip_pool: ActorPool = field(default=ActorPool(), metadata={"affects_result": False})
    ocr_pool: ActorPool = field(default=ActorPool(), metadata={"affects_result": False})
    rows_per_block: int = field(default=128, metadata={"affects_result": False})
    files_per_wave: int = 16  # the driver holds the scores of one wave: 3 GB a million rows at 768 numbers

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rows_per_block", "files_per_wave")


def score(recipe: ScoreRecipe) -> Manifest:
    """Write ROOT/scores, one row for each row of ROOT/pool, or only the waves that are missing.

    The manifest's counts: rows and, for each hard floor, the rows it stopped. Raises what `Station.require` and
    `begin` raise, InputError or RecipeError for weights that can't be had, StationError when rows were lost.
    """
    base = recipe.root.rstrip("/")
    pool, scores = Station(f"{base}/pool"), Station(f"{base}/scores")
    inputs = {"pool": pool.require("pool").fingerprint, **check(recipe.clip)}
    recipe_fingerprint, recipe_json = fingerprint(recipe), to_json(recipe)
    if not scores.begin(recipe_fingerprint, recipe_json, "scores", inputs):
        manifest = scores.require("scores")
        print(f"{scores.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    files = [f.removeprefix(f"{pool.uri}/") for f in pool.parquet_files()]
    waves = [files[i : i + recipe.files_per_wave] for i in range(0, len(files), recipe.files_per_wave)]
    counts: Counter[str] = Counter(rows=0)
    for index, names in enumerate(waves):
        target = scores.wave(index)
        if target.begin(recipe_fingerprint, recipe_json, "scores", inputs):
            table = _score_wave(recipe, pool, names, f"score: wave {index + 1} of {len(waves)}")
            target.write_table("part-00000.parquet", table)
            target.finish(rows=len(table), counts=_counts(table))
        counts.update(target.require("scores").counts)
    return scores.finish(rows=counts["rows"], counts=dict(counts))


def _score_wave(recipe: ScoreRecipe, pool: Station, names: list[str], said: str) -> pa.Table:
    """The scores of the pool's files `names`, sorted by key; StationError unless they are the same rows."""
    slices = cut(pool, names, recipe.rows_per_block)
    expected = np.sort(np.concatenate([read_part(pool, name, ["key"])["key"].to_numpy() for name in names]))
    found: list[pa.Table] = []
    with _said_regularly(said, len(expected)) as done:
        batches: Any = _pipeline(recipe, slices, pool).iter_batches(batch_size=None, batch_format="pyarrow")
        for table in batches:
            found.append(conform(table, "scores", said))
            done[0] += len(table)
    scores = pa.concat_tables(found, promote_options="permissive").sort_by("key")
    keys = scores["key"].to_numpy()
    if not np.array_equal(keys, expected):
        raise StationError(
            f"{said}: expected the {len(expected)} rows of {pool.uri}, found {len(keys)} "
            f"({len(np.setdiff1d(expected, keys))} lost): nothing was written; run it again"
        )
    return scores


class SliceScorer:
    """A PairScorer that reads its pairs itself: takes one Slice a call, gives all columns that PairScorer gives.

    So the encoded pictures cross the object store once, to OCR, and a block is a slice, whatever the files' sizes.
    """

    def __init__(self, pool: Station, recipe: ScoreRecipe) -> None:
        self.pool = pool
        self.batch_size = recipe.clip_pool.batch_size
        self.scorer = PairScorer(recipe.floors, recipe.clip, recipe.clip_pool.device)

    def __call__(self, item: pa.Table) -> pa.Table:
        pairs = read_slice(self.pool, Slice(**item.to_pylist()[0]), READ_COLUMNS)
        starts = range(0, len(pairs), self.batch_size)
        return pa.concat_tables([self.scorer(pairs.slice(start, self.batch_size)) for start in starts])


def _pipeline(recipe: ScoreRecipe, slices: list[Slice], pool: Station) -> ray.data.Dataset:
    """Slices in, scores out."""
    items = ray.data.from_items([vars(s) for s in slices], override_num_blocks=len(slices))
    items.context.enable_progress_bars = False  # the driver prints its own line
    items.context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    measured = items.map_batches(SliceScorer, fn_constructor_args=(pool, recipe), **_on(recipe.clip_pool, 1))
    return measured.map_batches(
        TextScorer,
        fn_constructor_args=(recipe.ocr, recipe.floors.caps, recipe.ocr_pool.device),
        **_on(recipe.ocr_pool, recipe.ocr_pool.batch_size),
    )


def _on(pool: ActorPool, batch_size: int) -> dict[str, Any]:
    return {
        "batch_format": "pyarrow",
        "batch_size": batch_size,
        "zero_copy_batch": True,
        "compute": ray.data.ActorPoolStrategy(size=pool.actors),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
    }


def _counts(table: pa.Table) -> dict[str, int]:
    gates = Counter(table["gate_reason"].to_pylist())
    undecodable = int(pc.sum(pc.not_equal(table["decode_error"], "")).as_py() or 0)
    return {
        "rows": len(table),
        "undecodable": undecodable,
        **{f"gate_{g}": n for g, n in sorted(gates.items()) if g not in ("", "undecodable")},
    }


@contextmanager
def _said_regularly(said: str, rows: int) -> Iterator[list[int]]:
    """Prints the progress now, every SAY_EVERY_S seconds and at the end; the list's one number is rows done."""
    done, started, ended = [0], time.monotonic(), threading.Event()

    def say() -> None:
        seconds = time.monotonic() - started
        print(f"{said}: {done[0]} of {rows} rows after {seconds:.0f} s", flush=True)

    def keep_saying() -> None:
        while not ended.wait(SAY_EVERY_S):
            say()

    say()
    speaker = threading.Thread(target=keep_saying, daemon=True)
    speaker.start()
    try:
        yield done
    finally:
        ended.set()
        speaker.join()
        say()
