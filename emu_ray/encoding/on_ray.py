"""Writes a `latents` station with Ray Data: pictures of `pool` (what the selection keeps) or of `chosen`, through the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy

from emu_ray.config import fingerprint, to_json
from emu_ray.encoding.encoder import LatentEncoder
from emu_ray.errors import InputError
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve


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
    rows_per_wave: int = 100_000


def encode(recipe: EncodeRecipe) -> Manifest:
    """Writes the station, or only the waves that are missing; InputError when no picture is left to encode."""
    source = Station(f"{recipe.root}/{recipe.source}")
    address = resolve(recipe.autoencoder, recipe.root)
    inputs = {recipe.source: source.require(recipe.source).fingerprint, "autoencoder": content_fingerprint(address)}
    kept = None
    if recipe.source == "pool" and recipe.keep_reasons is not None:
        selection = Station(f"{recipe.root}/selection")
        inputs["selection"] = selection.require("selection").fingerprint
        kept = _kept_keys(selection, recipe.keep_reasons)
    target = Station(f"{recipe.root}/latents/{recipe.use}")
    recipe_fingerprint, recipe_json = fingerprint(recipe), to_json(recipe)
    if not target.begin(recipe_fingerprint, recipe_json, "latents", inputs):
        manifest = target.require("latents")
        print(f"{target.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    autoencoder = local_folder(address)
    waves = _waves(source, kept, recipe.rows_per_wave)
    rows = 0
    for index, files in enumerate(waves):
        wave = target.wave(index)
        if wave.begin(recipe_fingerprint, recipe_json, "latents", inputs):
            print(f"encode {recipe.use}: wave {index + 1} of {len(waves)}", flush=True)
            _encode_wave(recipe, autoencoder, files, kept, wave)
        rows += wave.require("latents").rows or 0
    if rows == 0:
        raise InputError(
            f"no picture of {source.uri} is left to encode: look at the reasons in {recipe.root}/selection"
        )
    return target.finish(rows=rows)


def _kept_keys(selection: Station, reasons: tuple[str, ...]) -> pa.Array:
    table = selection.read_table(["key", "reject_reason"])
    return table.filter(pc.is_in(table["reject_reason"], pa.array(reasons)))["key"].combine_chunks()


def _waves(source: Station, kept: pa.Array | None, rows_per_wave: int) -> list[list[str]]:
    files, rows = source.parquet_files(), 0
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
    recipe: EncodeRecipe, autoencoder: Path, files: list[str], kept: pa.Array | None, wave: Station
) -> None:
    system, _ = wave.filesystem()
    paths = [f.removeprefix("s3://") for f in files]
    data = ray.data.read_parquet(paths, filesystem=system, columns=["key", "image", "caption"])
    data = data.repartition(max(2 * recipe.actors, len(files)))
    if kept is not None:
        keys = ray.put(np.sort(kept.to_numpy()))
        data = data.map_batches(_keep, fn_kwargs={"keys": keys}, batch_format="pyarrow", zero_copy_batch=True)
    data = data.map_batches(
        LatentEncoder,
        fn_constructor_args=(str(autoencoder), recipe.size_px),
        fn_constructor_kwargs={"device": "cuda" if recipe.num_gpus else "cpu"},
        batch_size=recipe.batch_size,
        num_cpus=recipe.num_cpus,
        num_gpus=recipe.num_gpus,
        compute=ActorPoolStrategy(min_size=recipe.actors, max_size=recipe.actors),
    )
    batches: Iterator[Any] = data.iter_batches(batch_format="pyarrow", batch_size=None)
    tables = [pa.Table.from_batches([b]) if isinstance(b, pa.RecordBatch) else b for b in batches]
    tables = [t for t in tables if t.num_rows]
    if tables:
        table = pa.concat_tables(tables, promote_options="permissive")
        wave.write_table("part-000000.parquet", table.sort_by("key"))
    wave.finish(rows=sum(t.num_rows for t in tables))


def _keep(table: Any, keys: Any) -> pa.Table:
    wanted = ray.get(keys) if isinstance(keys, ray.ObjectRef) else keys
    found = np.isin(table["key"].to_numpy(), wanted)
    has_caption = pc.not_equal(table["caption"], "").to_numpy(zero_copy_only=False)
    return table.filter(pa.array(found & has_caption))
