"""Writes the `scores` station with Ray Data: cheap gates and CLIP in one actor pool, OCR in the next.

A wave is a number of the pool's Parquet files: what is committed at once. Many waves pass through one
pipeline, so that models are loaded once for them; the scores of a wave (not its images) come to the driver, are checked to be
exactly the pool's rows, sorted by key and written. Run again, only missing waves are scored.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.pair_scorer import SECONDS, ActorPool, HardFloors, LabelScorer, PairScorer, TextScorer
from emu_ray.error_watch import ErrorWatch, Faults
from emu_ray.errors import RecipeError, StationError
from emu_ray.pictures.isolated import Decode, IsolatedDecoder
from emu_ray.records import conform
from emu_ray.stations import Manifest, Station
from emu_ray.stations.packed import OnPacked, packed, unpacked
from emu_ray.stations.slices import Slice, column_names, cut, read_part, read_slice
from emu_ray.stations.store import Store

READ_COLUMNS = ["key", "image", "caption", "width_px", "height_px", "likes"]
SAY_EVERY_S = 15.0
ERRORS = ("undecodable", "crashed_decoder", "scorer_failed")  # gates that tell of a fault, not of taste
FAULTS = Faults(
    counts=tuple(f"gate_{name}" for name in ERRORS),
    said="can't be decoded or measured",
    look_at="decode_error, the disk and the weights",
)
MAX_ATTEMPTS = 10  # at one slice, before it is given up
WATCHED_ROWS = 5000  # the last so many are judged for a jump of the error rate
FILES_AT_ONCE = 2048  # in a pipeline: about 100,000 slices, each an object that the driver holds
LISTERS = 16  # threads that ask the storage about waves and files


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
    files_per_wave: int = 16  # the driver holds the scores of a few waves: 3 GB a million rows at 768 numbers
    max_error_share: float = field(default=0.5, metadata={"affects_result": False})
    # of the last 5000 rows: undecodable or failed in a scorer (unfetched ones were counted by `fetch`)
    max_error_jump: float = field(
        default=0.25, metadata={"affects_result": False}
    )  # above the share of all waves before
    max_slice_s: float = field(default=1800.0, metadata={"affects_result": False})
    # a stage of a slice that takes longer hangs: its actor is ended, the slice tried again picture by picture
    max_decode_s: float = field(default=60.0, metadata={"affects_result": False})  # of a picture, in such a try

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rows_per_block", "files_per_wave", "side_px", "max_slice_s", "max_decode_s")


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
    recipe = _checked_classifiers(recipe, inputs)
    recipe_fingerprint, recipe_json = fingerprint(recipe), to_json(recipe)
    if not scores.begin(recipe_fingerprint, recipe_json, "scores", inputs):
        manifest = scores.require("scores")
        print(f"{scores.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    files = [f.removeprefix(f"{pool.uri}/") for f in pool.parquet_files()]
    waves = [files[i : i + recipe.files_per_wave] for i in range(0, len(files), recipe.files_per_wave)]
    targets = [scores.wave(index) for index in range(len(waves))]

    def is_missing(target: Station) -> bool:
        return target.begin(recipe_fingerprint, recipe_json, "scores", inputs)

    def facts_of(target: Station) -> tuple[dict[str, int], dict[str, float]]:
        done = target.require("scores")
        return done.counts, done.extra["seconds"]

    with ThreadPoolExecutor(LISTERS) as threads:
        are_missing = list(threads.map(is_missing, targets))
        missing = [index for index, begun in enumerate(are_missing) if begun]
        finished = threads.map(facts_of, [t for t, begun in zip(targets, are_missing, strict=True) if not begun])
        counts, seconds = Counter[str](rows=0), Counter[str]()
        for its_counts, its_seconds in finished:
            counts.update(its_counts)
            seconds.update(its_seconds)
    work = _Work(recipe, pool, Store(f"{base}/.attempts"), decode)
    waves_at_once = max(1, FILES_AT_ONCE // recipe.files_per_wave)
    groups = [missing[start : start + waves_at_once] for start in range(0, len(missing), waves_at_once)]
    ready = (one for group in groups for one in _scored_waves(work, {i: waves[i] for i in group}, counts))
    for index, table in ready:
        its_counts, its_seconds = _counts(table), {name: float(pc.sum(table[name]).as_py() or 0) for name in SECONDS}
        targets[index].write_table("part-00000.parquet", table.drop_columns(list(SECONDS)))
        targets[index].finish(rows=len(table), counts=its_counts, extra={"seconds": its_seconds})
        print(f"score: wave {index + 1} of {len(waves)} written, {len(table)} rows", flush=True)
        counts.update(its_counts)
        seconds.update(its_seconds)
    return scores.finish(rows=counts["rows"], counts=dict(counts), extra={"stages": _stages(recipe, counts, seconds)})


@dataclass(frozen=True)
class _Work:
    """What the actors need."""

    recipe: ScoreRecipe
    pool: Station
    attempts: Store  # a marker a slice and stage that was begun and not ended
    decode: Decode | None


def _scored_waves(work: _Work, waves: dict[int, list[str]], counts: Counter[str]) -> Iterator[tuple[int, pa.Table]]:
    """The scores of each wave (its number -> names of the pool's files) as they are ready, sorted by key.

    StationError unless a wave's rows are those of its files, or when too many fail: judged by the last WATCHED_ROWS and
    by `counts`, those of the waves before, which the caller adds to.
    """
    recipe = work.recipe
    with ThreadPoolExecutor(LISTERS) as threads:
        clearing = threads.map(work.attempts.delete, work.attempts.sizes())
        cuts = threads.map(lambda names: cut(work.pool, names, recipe.rows_per_block), waves.values())
        slices = [(index, each) for index, of_wave in zip(waves, cuts, strict=True) for each in of_wave]
        list(clearing)
    left = Counter[int]()
    for index, each in slices:
        left[index] += each.rows
    held: dict[int, list[pa.Table]] = {index: [] for index in waves}
    recent: deque[tuple[int, int]] = deque()
    with _said_regularly("score", sum(left.values())) as done:
        batches: Any = _pipeline(work, [each for _, each in slices]).iter_batches(
            batch_size=None, batch_format="pyarrow"
        )
        for row in batches:
            table = unpacked(row)
            index = slices[table["slice"][0].as_py()][0]
            held[index].append(table.drop_columns(["slice"]))
            left[index] -= len(table)
            done[0] += len(table)
            recent.append((sum(gate in ERRORS for gate in table["gate_reason"].to_pylist()), len(table)))
            while sum(rows for _, rows in recent) - recent[0][1] >= WATCHED_ROWS:
                recent.popleft()
            errors, rows = sum(e for e, _ in recent), sum(r for _, r in recent)
            if rows >= WATCHED_ROWS or not left[index]:
                watch = ErrorWatch.before(counts, recipe.max_error_share, recipe.max_error_jump, FAULTS)
                watch.check(errors, rows, f"score: wave {index + 1}")
            if not left[index]:
                yield index, _checked(work, index, waves[index], held.pop(index))
    if held:
        lost = sum(left.values())
        raise StationError(f"score: {lost} rows of {work.pool.uri} came to no end; run the same command again")


def _checked(work: _Work, index: int, names: list[str], found: list[pa.Table]) -> pa.Table:
    """The tables as one, sorted by key; StationError unless its keys are those of the pool's files `names`."""
    said = f"score: wave {index + 1}"
    with ThreadPoolExecutor(LISTERS) as threads:
        there = list(threads.map(lambda name: read_part(work.pool, name, ["key"])["key"].to_numpy(), names))
    expected = np.sort(np.concatenate(there))
    tables = [conform(table, "scores", said) for table in found]
    scores = pa.concat_tables(tables, promote_options="permissive").sort_by("key")
    keys = scores["key"].to_numpy()
    if not np.array_equal(keys, expected):
        raise StationError(
            f"{said}: expected the {len(expected)} rows of {work.pool.uri}, found {len(keys)} "
            f"({len(np.setdiff1d(expected, keys))} lost): nothing was written; run it again"
        )
    return scores


class SliceScorer:
    """A PairScorer that reads its pairs itself: takes one Slice a call, gives all columns that PairScorer gives, packed.

    So the encoded pictures cross the object store once a stage, and a row is a slice, whatever the files' sizes; the
    column `slice` is its number. A slice whose actor died is decoded in a child process, so that the picture that did
    it gets a reason.
    """

    def __init__(self, work: _Work) -> None:
        recipe = work.recipe
        self.work, self.batch_size = work, recipe.clip_pool.batch_size
        self.columns: list[str] | None = None
        self.scorer = PairScorer(recipe.floors, recipe.clip, recipe.clip_pool.device, recipe.side_px)
        if work.decode is not None:
            self.scorer.decode = work.decode

    def __call__(self, item: pa.Table) -> pa.Table:
        fields = item.to_pylist()[0]
        number, wanted = fields.pop("slice"), Slice(**fields)
        if self.columns is None:
            there = column_names(self.work.pool, f"{self.work.pool.uri}/{wanted.name}")
            self.columns = [*READ_COLUMNS, *(c for c in ("fetch_error",) if c in there)]
        with _attempt(self.work, f"measure-{number}", wanted.rows) as attempt:
            pairs = read_slice(self.work.pool, wanted, self.columns)
            parts = [pairs.slice(start, self.batch_size) for start in range(0, len(pairs), self.batch_size)]
            if attempt == 1:
                scored = [self.scorer(part) for part in parts]
            else:
                with IsolatedDecoder(self.scorer.decode, self.work.recipe.max_decode_s) as decode:
                    scored = [self.scorer(part, decode) for part in parts]
        return packed(pa.concat_tables(scored).append_column("slice", pa.array([number] * len(pairs), pa.int32())))


class LaterStage:
    """A scorer of the rows of one slice a call, which gives a slice up when too many of its actors have ended at it."""

    def __init__(self, work: _Work, stage: str, scorer: type[LabelScorer] | type[TextScorer], *given: Any) -> None:
        self.work, self.stage, self.scorer = work, stage, scorer(*given)

    def __call__(self, scored: pa.Table) -> pa.Table:
        with _attempt(self.work, f"{self.stage}-{scored['slice'][0].as_py()}", len(scored)):
            return self.scorer(scored)


@contextmanager
def _attempt(work: _Work, marker: str, rows: int) -> Iterator[int]:
    """Which attempt at a stage of a slice this is, from 1: written down before it begins, removed when it has ended.

    One that doesn't end in time ends its process, so that the next attempt decodes with a limit for each picture.
    """
    attempts, recipe = work.attempts, work.recipe
    number = int(attempts.get(marker) or b"0") + 1
    if number > MAX_ATTEMPTS:
        raise StationError(
            f"{attempts.path(marker)}: {MAX_ATTEMPTS} actors ended at this slice, not in the decoder: "
            "see the logs of the workers (memory?); run the same command again"
        )
    attempts.put(marker, str(number).encode())
    each_picture_s = 2 * recipe.max_decode_s if number > 1 else 0.0
    faulthandler.dump_traceback_later(
        recipe.max_slice_s + rows * each_picture_s, exit=True, file=sys.__stderr__ or sys.stderr
    )
    try:
        yield number
    finally:
        faulthandler.cancel_dump_traceback_later()
    attempts.delete(marker)


def _pipeline(work: _Work, slices: list[Slice]) -> ray.data.Dataset:
    """Slices in, scores out."""
    recipe = work.recipe
    numbered = [{**vars(each), "slice": number} for number, each in enumerate(slices)]
    items = ray.data.from_items(numbered, override_num_blocks=len(slices))
    items.context.enable_progress_bars = False  # the driver prints its own line
    items.context.target_max_block_size = None  # a row is a slice, of any size: what shares a batch is always the same
    items.context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    found = items.map_batches(SliceScorer, fn_constructor_args=(work,), **_on(recipe.clip_pool))

    def then(stage: str, pool: ActorPool, *given: Any) -> ray.data.Dataset:
        return found.map_batches(OnPacked, fn_constructor_args=(LaterStage, work, stage, *given), **_on(pool))

    classifiers = {"offensive": recipe.offensive_classifier, "watermark": recipe.watermark_classifier}
    for column, classifier in classifiers.items():
        if classifier is not None:
            pool = recipe.classifier_pool
            found = then(column, pool, LabelScorer, classifier, column, pool, recipe.floors, recipe.side_px)
    return then("text", recipe.ocr_pool, TextScorer, recipe.ocr, recipe.ocr_pool, recipe.floors, recipe.side_px)


def _on(pool: ActorPool) -> dict[str, Any]:
    many: dict[str, Any] = (
        {"size": pool.actors} if pool.max_actors is None else {"min_size": pool.actors, "max_size": pool.max_actors}
    )
    return {
        "batch_format": "pyarrow",
        "batch_size": 1,
        "zero_copy_batch": True,
        "compute": ray.data.ActorPoolStrategy(**many),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
    }


def _checked_classifiers(recipe: ScoreRecipe, inputs: dict[str, str]) -> ScoreRecipe:
    """With the commits of classifiers on the hub; what names their weights joins `inputs`. Before a GPU is taken."""
    if recipe.offensive_classifier and (recipe.clip.offensive_head or recipe.clip.safety_concepts):
        raise RecipeError(
            "expected one judge of offensive content, found an offensive_classifier beside a head or concepts on CLIP: "
            "set one to None"
        )
    if recipe.watermark_classifier and (recipe.clip.watermark_head or recipe.clip.watermark_phrases):
        raise RecipeError("expected one judge of watermarks, found a watermark_classifier beside one on CLIP")
    for name in ("offensive_classifier", "watermark_classifier"):
        if getattr(recipe, name) is not None:
            classifier = getattr(recipe, name).resolved()
            inputs[name] = check_classifier(classifier)
            recipe = replace(recipe, **{name: classifier})
    return recipe


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
