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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from emu_ray.config import fingerprint, require_at_least, to_json
from emu_ray.curation.classifier_scorer import Classifier, check_classifier
from emu_ray.curation.clip_scorer import ClipModel, check
from emu_ray.curation.error_watch import ERRORS, ErrorWatch
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.pair_scorer import SECONDS, ActorPool, HardFloors, LabelScorer, PairScorer, TextScorer
from emu_ray.errors import RecipeError, StationError
from emu_ray.pictures.isolated import Decode, IsolatedDecoder
from emu_ray.records import conform
from emu_ray.stations import Manifest, Station
from emu_ray.stations.slices import Slice, column_names, cut, read_part, read_slice
from emu_ray.stations.store import Store

READ_COLUMNS = ["key", "image", "caption", "width_px", "height_px", "likes"]
SAY_EVERY_S = 15.0
MAX_ATTEMPTS = 10  # at one slice, before it is given up


@dataclass(frozen=True, kw_only=True)
class ScoreRecipe:
    """What is measured, and on how much hardware."""

    root: str  # ROOT/pool -> ROOT/scores
    clip: ClipModel = ClipModel()
    ocr: OcrSettings = OcrSettings()
    floors: HardFloors = HardFloors()
    offensive_classifier: Classifier | None = None  # instead of a head or concepts on CLIP
    watermark_classifier: Classifier | None = None
    side_px: int = 1280  # pictures at least twice as long are shrunk while decoded, to at least this
    clip_pool: ActorPool = field(default=ActorPool(), metadata={"affects_result": False})
    classifier_pool: ActorPool = field(default=ActorPool(), metadata={"affects_result": False})  # of each classifier
    ocr_pool: ActorPool = field(default=ActorPool(), metadata={"affects_result": False})
    rows_per_block: int = field(default=128, metadata={"affects_result": False})
    files_per_wave: int = 16  # the driver holds the scores of one wave: 3 GB a million rows at 768 numbers
    max_error_share: float = field(default=0.5, metadata={"affects_result": False})
    # of a wave's rows: undecodable or failed in a scorer (unfetched ones were counted by `fetch`)
    max_error_jump: float = field(
        default=0.25, metadata={"affects_result": False}
    )  # above the share of all waves before

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rows_per_block", "files_per_wave", "side_px")


def score(recipe: ScoreRecipe, decode: Decode | None = None) -> Manifest:
    """Write ROOT/scores, one row for each row of ROOT/pool, or only the waves that are missing.

    The manifest's counts: rows, measured and, for each gate, the rows it stopped: rows = measured + all gates. Its
    extra has "stages": stage -> rows, seconds of actors, and the cpus and gpus of an actor. `decode` (bytes to Decoded)
    stands in for the usual decoder. Raises what `Station.require` and `begin` raise, InputError or RecipeError for
    weights that can't be had, StationError when rows were lost or too many of them failed.
    """
    base = recipe.root.rstrip("/")
    recipe = replace(recipe, clip=recipe.clip.resolved())
    pool, scores = Station(f"{base}/pool"), Station(f"{base}/scores")
    inputs = {"pool": pool.require("pool").fingerprint, **check(recipe.clip)}
    _check_classifiers(recipe)
    recipe_fingerprint, recipe_json = fingerprint(recipe), to_json(recipe)
    if not scores.begin(recipe_fingerprint, recipe_json, "scores", inputs):
        manifest = scores.require("scores")
        print(f"{scores.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    files = [f.removeprefix(f"{pool.uri}/") for f in pool.parquet_files()]
    waves = [files[i : i + recipe.files_per_wave] for i in range(0, len(files), recipe.files_per_wave)]
    counts: Counter[str] = Counter(rows=0)
    seconds: Counter[str] = Counter()
    for index, names in enumerate(waves):
        target, attempts = scores.wave(index), Store(f"{base}/.attempts/wave-{index:05d}")
        if target.begin(recipe_fingerprint, recipe_json, "scores", inputs):
            work = _Work(
                recipe, pool, attempts, decode, ErrorWatch.before(counts, recipe.max_error_share, recipe.max_error_jump)
            )
            table = _score_wave(work, names, f"score: wave {index + 1} of {len(waves)}")
            stages = {name: float(pc.sum(table[name]).as_py() or 0) for name in SECONDS}
            target.write_table("part-00000.parquet", table.drop_columns(list(SECONDS)))
            target.finish(rows=len(table), counts=_counts(table), extra={"seconds": stages})
        done = target.require("scores")
        counts.update(done.counts)
        seconds.update(done.extra["seconds"])
    return scores.finish(rows=counts["rows"], counts=dict(counts), extra={"stages": _stages(recipe, counts, seconds)})


@dataclass(frozen=True)
class _Work:
    """What a wave needs besides the names of its files; goes to the actors."""

    recipe: ScoreRecipe
    pool: Station
    attempts: Store  # a marker a slice that was begun and not ended
    decode: Decode | None
    watch: ErrorWatch


def _score_wave(work: _Work, names: list[str], said: str) -> pa.Table:
    """The scores of the pool's files `names`, sorted by key; StationError unless they are the same rows."""
    for marker in work.attempts.sizes():
        work.attempts.delete(marker)
    slices = cut(work.pool, names, work.recipe.rows_per_block)
    expected = np.sort(np.concatenate([read_part(work.pool, name, ["key"])["key"].to_numpy() for name in names]))
    found: list[pa.Table] = []
    errors = 0
    with _said_regularly(said, len(expected)) as done:
        batches: Any = _pipeline(work, slices).iter_batches(batch_size=None, batch_format="pyarrow")
        for table in batches:
            found.append(conform(table, "scores", said))
            done[0] += len(table)
            errors += sum(gate in ERRORS for gate in table["gate_reason"].to_pylist())
            work.watch.check(errors, done[0], said)
    scores = pa.concat_tables(found, promote_options="permissive").sort_by("key")
    keys = scores["key"].to_numpy()
    if not np.array_equal(keys, expected):
        raise StationError(
            f"{said}: expected the {len(expected)} rows of {work.pool.uri}, found {len(keys)} "
            f"({len(np.setdiff1d(expected, keys))} lost): nothing was written; run it again"
        )
    return scores


class SliceScorer:
    """A PairScorer that reads its pairs itself: takes one Slice a call, gives all columns that PairScorer gives.

    So the encoded pictures cross the object store once a stage, and a block is a slice, whatever the files' sizes.
    A slice whose actor died is decoded in a child process, so that the picture that did it gets a reason.
    """

    def __init__(self, work: _Work) -> None:
        recipe = work.recipe
        self.work, self.batch_size = work, recipe.clip_pool.batch_size
        self.columns: list[str] | None = None
        self.scorer = PairScorer(recipe.floors, recipe.clip, recipe.clip_pool.device, recipe.side_px)
        if work.decode is not None:
            self.scorer.decode = work.decode

    def __call__(self, item: pa.Table) -> pa.Table:
        wanted = Slice(**item.to_pylist()[0])
        if self.columns is None:
            there = column_names(self.work.pool, f"{self.work.pool.uri}/{wanted.name}")
            self.columns = [*READ_COLUMNS, *(c for c in ("fetch_error",) if c in there)]
        pairs = read_slice(self.work.pool, wanted, self.columns)
        parts = [pairs.slice(start, self.batch_size) for start in range(0, len(pairs), self.batch_size)]
        marker = f"{wanted.name.replace('/', '-')}-{wanted.group}-{wanted.start}"
        if self._attempt(marker, wanted) == 1:
            scored = [self.scorer(part) for part in parts]
        else:
            with IsolatedDecoder(self.scorer.decode) as decode:
                scored = [self.scorer(part, decode) for part in parts]
        self.work.attempts.delete(marker)
        return pa.concat_tables(scored)

    def _attempt(self, marker: str, wanted: Slice) -> int:
        """Which attempt at the slice this is, from 1, written down before it begins."""
        number = int(self.work.attempts.get(marker) or b"0") + 1
        if number > MAX_ATTEMPTS:
            raise StationError(
                f"{wanted.path}, row group {wanted.group}, rows from {wanted.start}: {MAX_ATTEMPTS} actors ended there, "
                "not in the decoder: see the logs of the workers (memory?); run the same command again"
            )
        self.work.attempts.put(marker, str(number).encode())
        return number


def _pipeline(work: _Work, slices: list[Slice]) -> ray.data.Dataset:
    """Slices in, scores out."""
    recipe = work.recipe
    items = ray.data.from_items([vars(s) for s in slices], override_num_blocks=len(slices))
    items.context.enable_progress_bars = False  # the driver prints its own line
    items.context.target_max_block_size = None  # a block is a slice: what shares a batch is always the same
    items.context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    measured = items.map_batches(SliceScorer, fn_constructor_args=(work,), **_on(recipe.clip_pool, 1))
    classifiers = {"offensive": recipe.offensive_classifier, "watermark": recipe.watermark_classifier}
    for column, classifier in classifiers.items():
        if classifier is not None:
            given = (classifier, column, recipe.classifier_pool, recipe.floors, recipe.side_px)
            measured = measured.map_batches(LabelScorer, fn_constructor_args=given, **_on(recipe.classifier_pool, None))
    given_ocr = (recipe.ocr, recipe.ocr_pool, recipe.floors, recipe.side_px)
    return measured.map_batches(TextScorer, fn_constructor_args=given_ocr, **_on(recipe.ocr_pool, None))


def _on(pool: ActorPool, rows_a_call: int | None) -> dict[str, Any]:
    many: dict[str, Any] = (
        {"size": pool.actors} if pool.max_actors is None else {"min_size": pool.actors, "max_size": pool.max_actors}
    )
    return {
        "batch_format": "pyarrow",
        "batch_size": rows_a_call,
        "zero_copy_batch": True,
        "compute": ray.data.ActorPoolStrategy(**many),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
    }


def _check_classifiers(recipe: ScoreRecipe) -> None:
    """On the driver, before a GPU is taken."""
    if recipe.offensive_classifier and (recipe.clip.offensive_head or recipe.clip.safety_concepts):
        raise RecipeError(
            "expected one judge of offensive content, found an offensive_classifier beside a head or concepts on CLIP: "
            "set one to None"
        )
    if recipe.watermark_classifier and (recipe.clip.watermark_head or recipe.clip.watermark_phrases):
        raise RecipeError("expected one judge of watermarks, found a watermark_classifier beside one on CLIP")
    for classifier in (recipe.offensive_classifier, recipe.watermark_classifier):
        if classifier is not None:
            check_classifier(classifier)


def _counts(table: pa.Table) -> dict[str, int]:
    gates = Counter(table["gate_reason"].to_pylist())
    measured = gates.pop("", 0)
    return {"rows": len(table), "measured": measured, **{f"gate_{g}": n for g, n in sorted(gates.items())}}


def _stages(recipe: ScoreRecipe, counts: Counter[str], seconds: Counter[str]) -> dict[str, dict[str, float]]:
    """Stage -> rows that went through the actors, their seconds, and what an actor takes: for reports and plans."""
    pools = {"decode": recipe.clip_pool, "clip": recipe.clip_pool, "ocr": recipe.ocr_pool}
    if recipe.offensive_classifier or recipe.watermark_classifier:
        pools["classifier"] = recipe.classifier_pool
    return {
        name: {
            "rows": counts["rows"],
            "seconds": round(seconds[f"seconds_{name}"], 3),
            "cpus": max(1.0, pool.cpus),  # its thread keeps one busy, whatever share it reserves
            "gpus": pool.gpus,
        }
        for name, pool in pools.items()
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
