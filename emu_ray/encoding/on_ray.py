"""Writes a `latents` station with Ray Data: pictures of `pool` (what the selection keeps) or of `chosen`, through the autoencoder."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy

from emu_ray.config import fingerprint, require_at_least, to_json
from emu_ray.encoding.buckets import bucket_sizes
from emu_ray.encoding.encoder import LatentEncoder
from emu_ray.encoding.kept import is_kept, kept_keys
from emu_ray.errors import InputError
from emu_ray.models.autoencoder import identity_of
from emu_ray.records import ORIGIN, SCHEMAS
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve
from emu_ray.stations.slices import Slice, cut, read_slice

COLUMNS = pa.schema([*SCHEMAS["latents"], *((name, pa.int32()) for name in ORIGIN)])
ROWS_PER_SLICE = 128
SAY_EVERY_S = 15.0
MADE_BY = "autoencoder"  # in a finished station's `extra`: the identity of the one that made its latents


@dataclass(frozen=True, kw_only=True)
class EncodeRecipe:
    """Which pictures become `root`/latents/`use`, and by which autoencoder."""

    root: str
    use: str  # the name of the set, e.g. "pretrain" or "quality"
    source: Literal["pool", "chosen"]
    autoencoder: str = field(
        metadata={"affects_result": False}
    )  # a folder; ROOT/ stands for the root; its content counts
    size_px: int
    keep_reasons: tuple[str, ...] | None = (
        "",
    )  # of the selection, for source "pool"; None takes every row of the pool
    batch_size: int = field(default=32, metadata={"affects_result": False})
    actors: int = field(default=2, metadata={"affects_result": False})
    num_cpus: float = field(default=1, metadata={"affects_result": False})
    num_gpus: float = field(default=0, metadata={"affects_result": False})
    # Longest side over shortest of the buckets that pictures of other shapes get; 1 crops all to squares.
    max_aspect: float = 1.0
    bucket_step_px: int = 64  # sides of buckets are multiples of it
    keep_std: bool = True  # False leaves `latent_std` empty: half the bytes, and training on posterior means alone
    rows_per_part: int = (
        1024  # of a file, which one actor writes; small sets want small ones, so that all actors have work
    )
    rows_per_wave: int = 100_000

    def __post_init__(self) -> None:
        require_at_least(self, 1, "size_px", "batch_size", "actors", "bucket_step_px", "rows_per_part", "rows_per_wave")
        bucket_sizes(self.size_px, self.max_aspect, self.bucket_step_px)


def encode(recipe: EncodeRecipe) -> Manifest:
    """Writes the station, or only the waves that are missing; InputError when no picture is left to encode."""
    source = Station(f"{recipe.root}/{recipe.source}")
    address = resolve(recipe.autoencoder, recipe.root)
    inputs = {recipe.source: source.require(recipe.source).fingerprint, "autoencoder": content_fingerprint(address)}
    kept = None
    if recipe.source == "pool" and recipe.keep_reasons is not None:
        selection = Station(f"{recipe.root}/selection")
        inputs["selection"] = selection.require("selection").fingerprint
        kept = kept_keys(selection, recipe.keep_reasons)
    target = Station(f"{recipe.root}/latents/{recipe.use}")
    recipe_fingerprint, recipe_json = fingerprint(recipe), to_json(recipe)
    if not target.begin(recipe_fingerprint, recipe_json, "latents", inputs):
        manifest = target.require("latents")
        print(f"{target.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    autoencoder = local_folder(address)
    waves = _waves(source, kept, recipe.rows_per_wave)
    rows = 0
    for index, names in enumerate(waves):
        wave = target.wave(index)
        if wave.begin(recipe_fingerprint, recipe_json, "latents", inputs):
            print(f"encode {recipe.use}: wave {index + 1} of {len(waves)}", flush=True)
            _encode_wave(recipe, autoencoder, source, names, kept, wave)
        rows += wave.require("latents").rows or 0
    if rows == 0:
        raise InputError(
            f"no picture of {source.uri} is left to encode: look at the reasons in {recipe.root}/selection"
        )
    return target.finish(rows=rows, extra={MADE_BY: identity_of(autoencoder)})


def _waves(source: Station, kept: np.ndarray | None, rows_per_wave: int) -> list[list[str]]:
    files, rows = [f.removeprefix(f"{source.uri}/") for f in source.parquet_files()], 0
    waves: list[list[str]] = [[]]
    per_file = max(1, (source.require().rows or 0) // max(len(files), 1))
    for file in files:
        if rows + per_file > rows_per_wave and waves[-1]:
            waves.append([])
            rows = 0
        waves[-1].append(file)
        rows += per_file
    return waves


def _encode_wave(
    recipe: EncodeRecipe, autoencoder: Path, source: Station, names: list[str], kept: np.ndarray | None, wave: Station
) -> None:
    parts = _parts(cut(source, names, min(ROWS_PER_SLICE, recipe.rows_per_part)), recipe.rows_per_part)
    items = ray.data.from_items([{"part": i, "slices": [vars(s) for s in p]} for i, p in enumerate(parts)], override_num_blocks=len(parts))  # fmt: skip
    items.context.enable_progress_bars = False  # the driver prints its own line
    keys = None if kept is None else ray.put(kept)
    written = items.map_batches(
        PartWriter,
        fn_constructor_args=(source, wave, str(autoencoder), recipe, keys),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=recipe.num_cpus,
        num_gpus=recipe.num_gpus,
        compute=ActorPoolStrategy(size=recipe.actors),
    )
    rows, said = 0, time.monotonic()
    batches: Iterable[Any] = written.iter_batches(batch_format="pyarrow", batch_size=None)
    for table in batches:
        rows += sum(table["rows"].to_pylist())
        if time.monotonic() - said > SAY_EVERY_S:
            print(f"encode {recipe.use}: {rows} pictures", flush=True)
            said = time.monotonic()
    wave.finish(rows=rows)


def _parts(slices: list[Slice], rows_per_part: int) -> list[list[Slice]]:
    """The slices in groups of about so many rows, a function of the source's files alone."""
    parts: list[list[Slice]] = []
    rows = 0
    for one in slices:
        if not parts or rows + one.rows > rows_per_part:
            parts.append([])
            rows = 0
        parts[-1].append(one)
        rows += one.rows
    return parts


class PartWriter:
    """Reads the pairs of a part's slices, encodes those that are kept and writes the part itself: latents never pass through the driver.

    Takes `part` and `slices`, one row a call; gives `rows`, the number written. A part's rows are mixed by the part's number, then laid by
    bucket, one row group or more a bucket: what training reads together. Run again, it writes the same file.
    """

    def __init__(self, source: Station, wave: Station, autoencoder: str, recipe: EncodeRecipe, kept: Any) -> None:
        self.source, self.wave, self.batch_size = source, wave, recipe.batch_size
        self.kept = None if kept is None else ray.get(kept)
        sizes = bucket_sizes(recipe.size_px, recipe.max_aspect, recipe.bucket_step_px)
        device = "cuda" if recipe.num_gpus else "cpu"
        self.encoder = LatentEncoder(autoencoder, sizes, keeps_std=recipe.keep_std, device=device)

    def __call__(self, item: pa.Table) -> pa.Table:
        """Writes one part."""
        (wanted,) = item.to_pylist()
        tables = [self._encoded(Slice(**one)) for one in wanted["slices"]]
        table = pa.concat_tables(tables)
        if len(table):
            mixed = table.take(np.random.default_rng([17, wanted["part"]]).permutation(len(table)))
            buckets = sorted(set(mixed["bucket"].to_pylist()))
            groups = [mixed.filter(pc.equal(mixed["bucket"], bucket)) for bucket in buckets]
            self.wave.write_groups(f"part-{wanted['part']:06d}.parquet", groups)
        return pa.table({"rows": [len(table)]})

    def _encoded(self, one: Slice) -> pa.Table:
        pairs = read_slice(self.source, one, ["key", "image", "caption"])
        wanted = pc.not_equal(pairs["caption"], "").to_numpy()
        if self.kept is not None:
            wanted = wanted & is_kept(pairs["key"].to_numpy(), self.kept)
        pairs = pairs.filter(pa.array(wanted))
        found = [self._encode(pairs.slice(start, self.batch_size)) for start in range(0, len(pairs), self.batch_size)]
        return pa.concat_tables(found) if found else COLUMNS.empty_table()

    def _encode(self, pairs: pa.Table) -> pa.Table:
        columns = self.encoder({name: np.array(pairs[name].to_pylist(), dtype=object) for name in pairs.column_names})
        return pa.table({column.name: pa.array(list(columns[column.name]), column.type) for column in COLUMNS})
