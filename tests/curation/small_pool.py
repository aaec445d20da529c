"""A finished `pool` station of given pairs, dealt to several files, and a recipe that scores it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.on_ray import ScoreRecipe
from emu_ray.curation.pair_scorer import ActorPool
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Station


def write_pool(root: Path | str, pairs: list[Pair], files: int = 2) -> pa.Table:
    """Write ROOT/pool and give its rows in the order of the pairs."""
    table = pa.concat_tables(pool_tables(pairs, Caps()))
    pool = Station(f"{root}/pool")
    pool.begin("recipe", "{}", "pool", {})
    step = -(-len(table) // files)
    for i in range(files):
        pool.write_table(f"part-{i:05d}.parquet", table.slice(i * step, step))
    pool.finish(rows=len(table))
    return table


def pairs_of(images: list[bytes]) -> list[Pair]:
    """A pair of each, with a caption."""
    return [Pair(image=image, caption=f"picture {n}", address=f"{n}") for n, image in enumerate(images)]


def small_recipe(root: Path | str, weights: Path, **changes: Any) -> ScoreRecipe:
    """The small CLIP of the fixture `untrained`, OCR at its smallest, half a CPU an actor."""
    return ScoreRecipe(
        root=str(root),
        clip=ClipModel(name="emu-demo", folder=str(weights / "clip"), concepts=("ball", "cube")),
        ocr=OcrSettings(canvas_px=64),
        clip_pool=ActorPool(actors=1, cpus=0.5, batch_size=4),
        ocr_pool=ActorPool(actors=1, cpus=0.5, batch_size=4),
        **{"rows_per_block": 8, "files_per_wave": 2, **changes},
    )
