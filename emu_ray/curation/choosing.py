"""Writes the `chosen` station: what people took from the selection, with the captions they wrote.

Until the studio stands, "people" are a CSV file, or a simulated annotator of known error for pools with a `truth`
column, or nobody (`take_top`); the manifest says which.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emu_ray.config import absolute, fingerprint, to_json
from emu_ray.curation.policy import KEPT
from emu_ray.errors import InputError
from emu_ray.pictures.decode import decode
from emu_ray.records import SCHEMAS
from emu_ray.stations import Manifest, Station
from emu_ray.stations.store import said_plainly

SEEN_BY_PEOPLE = ("overlaid_text", "offensive")  # defects of the picture that a person would not take
CSV_COLUMNS = ("key", "caption")


@dataclass(frozen=True, kw_only=True)
class ChooseRecipe:
    """Who chooses: ROOT/selection and ROOT/pool -> ROOT/chosen."""

    root: str
    annotator: Literal["csv", "simulated", "take_top"] = "csv"
    # csv: the rows of `choices`; simulated: what is photogenic by the pool's truth, each judged wrongly at the error
    # rate; take_top: everything selected with its own caption
    choices: str | None = None  # a CSV with the columns key, caption and, if wanted, annotator
    error_rate: float = 0.05  # of the simulated annotator, 0 to 1
    seed: int = 0
    max_images: int | None = None  # in the order of rank (of the file for csv)


@dataclass(frozen=True)
class Choice:
    """One picture taken by somebody; caption None keeps the pool's."""

    key: int
    annotator: str
    caption: str | None = None


def choose(recipe: ChooseRecipe) -> Manifest:
    """Write ROOT/chosen, images copied from the pool, in the order they were chosen.

    The manifest's counts: rows, candidates; its extra says the `annotator`, its `error_rate` and `seed` where
    simulated. InputError for a CSV that is unreadable, lacks a column, names an unknown or a doubled key,
    or has an empty caption, for a pool without truth, and when nothing is chosen.
    """
    base = recipe.root.rstrip("/")
    pool, selection, chosen = (Station(f"{base}/{name}") for name in ("pool", "selection", "chosen"))
    inputs = {
        "pool": pool.require("pool").fingerprint,
        "selection": selection.require("selection").fingerprint,
    }
    text = _read_choices(recipe) if recipe.annotator == "csv" else ""
    judged = selection.read_table()
    if text:
        inputs["choices"] = fingerprint_of(text)
    if not chosen.begin(fingerprint(recipe), to_json(recipe), "chosen", inputs):
        manifest = chosen.require("chosen")
        print(f"{chosen.uri}: finished before, {manifest.rows} images; nothing to do", flush=True)
        return manifest
    candidates = ranked_candidates(judged)
    if recipe.annotator == "csv":
        choices = from_csv(text, set(judged["key"].to_pylist()), str(recipe.choices))
    elif recipe.annotator == "simulated":
        choices = simulated(candidates, _truth(pool, candidates), recipe.error_rate, recipe.seed)
    else:
        choices = [Choice(key, "take_top") for key in candidates]
    choices = choices[: recipe.max_images]
    if not choices:
        raise InputError(f"the {recipe.annotator} annotator took none of {len(candidates)} candidates of {base}")
    chosen.write_table("part-00000.parquet", chosen_table(choices, pool))
    extra: dict[str, object] = {"annotator": recipe.annotator}
    if recipe.annotator == "simulated":
        extra |= {"error_rate": recipe.error_rate, "seed": recipe.seed}
    return chosen.finish(rows=len(choices), counts={"rows": len(choices), "candidates": len(candidates)}, extra=extra)


def ranked_candidates(selection: pa.Table) -> list[int]:
    """Keys of the kept rows, best rank first."""
    kept = selection.filter(pc.equal(selection["reject_reason"], KEPT))
    return kept.sort_by([("rank", "ascending"), ("key", "ascending")])["key"].to_pylist()


def from_csv(text: str, known_keys: set[int], where: str) -> list[Choice]:
    """The choices in a CSV, in its order; people may also take a rejected pair. InputError names the row."""
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        lines = list(reader)
    except csv.Error as error:
        raise InputError(f"{where}: expected a CSV of key and caption, found text that isn't CSV: {error}") from error
    columns = reader.fieldnames or ()
    if missing := [c for c in CSV_COLUMNS if c not in columns]:
        raise InputError(f"{where}: expected a column {missing[0]!r}, found {', '.join(columns) or 'none'}")
    choices: list[Choice] = []
    seen: set[int] = set()
    for number, line in enumerate(lines, start=2):
        at = f"{where}, row {number}"
        try:
            key = int(str(line["key"]))
        except ValueError as error:
            raise InputError(f"{at}: expected a whole number as key, found {line['key']!r}") from error
        if key not in known_keys:
            raise InputError(f"{at}: the key {key} is not in the selection of this root")
        if key in seen:
            raise InputError(f"{at}: the key {key} stands there a second time: keep one caption for it")
        caption = (line["caption"] or "").strip()
        if not caption:
            raise InputError(f"{at}: the caption of key {key} is empty")
        seen.add(key)
        choices.append(Choice(key, (line.get("annotator") or "").strip() or "csv", caption))
    return choices


def simulated(candidates: list[int], truth: dict[int, str], error_rate: float, seed: int) -> list[Choice]:
    """Photogenic candidates without a visible defect, in order; each judgement is wrong with `error_rate`.

    Whether the judgement of a key is wrong depends on (seed, key) alone, not on its place among the candidates.
    """
    if not 0 <= error_rate <= 1:
        raise InputError(f"expected an error rate between 0 and 1, found {error_rate}")
    choices = []
    for key in candidates:
        fact = json.loads(truth[key])
        is_good = bool(fact["photogenic"]) and fact["defect"] not in SEEN_BY_PEOPLE
        is_wrong = np.random.default_rng([seed, key % 2**64]).random() < error_rate
        if is_good != is_wrong:
            choices.append(Choice(key, f"simulated, error rate {error_rate:g}"))
    return choices


def chosen_table(choices: list[Choice], pool: Station) -> pa.Table:
    """The `chosen` rows of `choices`, in their order; reads the images of these keys only, part by part.

    InputError when a picture can't be decoded: people may take a rejected pair, but not one without a picture.
    """
    rows = _rows_of(pool, [c.key for c in choices], ["key", "image", "caption"])
    found = {row["key"]: row for row in rows.to_pylist()}
    for choice in choices:
        if error := decode(found[choice.key]["image"]).error:
            raise InputError(f"the picture of the chosen key {choice.key} can't be decoded ({error}): choose another")
    captions = [c.caption or found[c.key]["caption"] for c in choices]
    schema = SCHEMAS["chosen"]
    columns = {
        "key": [c.key for c in choices],
        "image": [found[c.key]["image"] for c in choices],
        "caption": captions,
        "votes": [None] * len(choices),
        "annotator": [c.annotator for c in choices],
    }
    return pa.table(columns, schema=schema)


def fingerprint_of(text: str) -> str:
    """16 hex digits of a file's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_choices(recipe: ChooseRecipe) -> str:
    if recipe.choices is None:
        raise InputError("the csv annotator needs --choices FILE.csv with the columns key and caption")
    path = absolute(recipe.choices, "--choices")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the choices {path}: {error}") from error


def _truth(pool: Station, keys: list[int]) -> dict[int, str]:
    rows = _rows_of(pool, keys, ["key", "truth"])
    return dict(zip(rows["key"].to_pylist(), rows["truth"].to_pylist(), strict=True))


def _rows_of(pool: Station, keys: list[int], columns: list[str]) -> pa.Table:
    """The rows with these keys, read part by part; InputError for a column the pool lacks."""
    system, base = pool.filesystem()
    wanted = pa.array(keys, pa.int64())
    tables: list[pa.Table] = []
    for uri in pool.parquet_files():
        with said_plainly("read", uri):
            file = pq.ParquetFile(f"{base}/{uri.removeprefix(f'{pool.uri}/')}", filesystem=system)
            if missing := [c for c in columns if c not in file.schema_arrow.names]:
                raise InputError(f"{uri}: expected a column {missing[0]!r}: only a generated pool has it")
            for group in file.iter_batches(columns=columns):
                table = pa.Table.from_batches([group])
                tables.append(table.filter(pc.is_in(table["key"], value_set=wanted)))
    return pa.concat_tables(tables)
