"""Writes a `samples` station: prompts drawn by a checkpoint, on a Ray Data actor pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from emu_ray.config import absolute, fingerprint, require_at_least, to_json
from emu_ray.errors import InputError
from emu_ray.generation.generator import Generator, SamplingSettings
from emu_ray.generation.prompts import file_prompts
from emu_ray.generation.samples import to_png
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve


@dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """`checkpoint` draws every prompt with its own seed -> `root`/samples/`run`; equal seeds for every run of the same prompts."""

    root: str
    run: str
    checkpoint: str = field(metadata={"affects_result": False})  # ROOT/ stands for the root; its content counts
    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None  # in place of `prompts`: one a line, or a TSV with a column Prompt
    first_seed: int = 1000
    settings: SamplingSettings = SamplingSettings()
    batch_size: int = field(default=16, metadata={"affects_result": False})
    actors: int = field(default=2, metadata={"affects_result": False})
    num_cpus: float = field(default=1, metadata={"affects_result": False})
    num_gpus: float = field(default=0, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "actors")


class Drawer:
    """Reads `prompt` and `seed`; adds `image`, PNG bytes. The model is loaded once an actor."""

    def __init__(self, checkpoint: str, settings: SamplingSettings, device: str) -> None:
        torch.set_num_threads(1)
        self.generator = Generator(checkpoint, device=device)
        self.settings = settings

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One batch of prompts."""
        images = self.generator.generate(
            [str(p) for p in batch["prompt"]], [int(s) for s in batch["seed"]], self.settings
        )
        return {**batch, "image": np.array([to_png(i) for i in images], dtype=object)}


def sample(recipe: SampleRecipe) -> Manifest:
    """Writes the station, or nothing when it is finished; InputError without prompts."""
    if recipe.prompts_file is not None:
        prompts = file_prompts(absolute(recipe.prompts_file, "--prompts-file"))
        recipe = dataclasses.replace(recipe, prompts=prompts, prompts_file=None)
    if not recipe.prompts:
        raise InputError("no prompts to draw: give --prompts-file or --prompts, or a recipe that has some")
    checkpoint = resolve(recipe.checkpoint, recipe.root)
    target = Station(f"{recipe.root}/samples/{recipe.run}")
    if not target.begin(
        fingerprint(recipe), to_json(recipe), "samples", {"checkpoint": content_fingerprint(checkpoint)}
    ):
        manifest = target.require("samples")
        print(f"{target.uri}: finished before, {manifest.rows} rows; nothing to do", flush=True)
        return manifest
    rows = [
        {"prompt_id": i, "prompt": prompt, "seed": recipe.first_seed + i} for i, prompt in enumerate(recipe.prompts)
    ]
    blocks = max(1, min(len(rows), -(-len(rows) // recipe.batch_size)))
    data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Drawer,
        fn_constructor_args=(str(local_folder(checkpoint)), recipe.settings, "cuda" if recipe.num_gpus else "cpu"),
        batch_size=recipe.batch_size,
        num_cpus=recipe.num_cpus,
        num_gpus=recipe.num_gpus,
        compute=ActorPoolStrategy(size=recipe.actors),
    )
    done, tables = 0, []
    batches: Iterable[Any] = data.iter_batches(batch_format="pyarrow", batch_size=None)
    for table in batches:
        tables.append(
            table.cast(table.schema.set(table.schema.get_field_index("prompt_id"), pa.field("prompt_id", pa.int32())))
        )
        done += table.num_rows
        print(f"sample {recipe.run}: {done} of {len(rows)} pictures", flush=True)
    target.write_table("part-000000.parquet", pa.concat_tables(tables).sort_by("prompt_id"))
    return target.finish(rows=len(rows))
