"""Writes a haystack as the `pool` station, chunks as Ray tasks."""

from __future__ import annotations

from dataclasses import dataclass

from emu_ray.config import require_at_least
from emu_ray.haystack.pool import HaystackSource, chunk_table
from emu_ray.ingest.on_ray import WaveSettings, ingest_tables
from emu_ray.stations import Manifest, Station


@dataclass(frozen=True, kw_only=True)
class HaystackRecipe:
    """A generated pool: `root`/pool."""

    root: str
    haystack: HaystackSource = HaystackSource()
    rows_per_file: int = 10_000
    shards_per_wave: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rows_per_file", "shards_per_wave")


def generate(recipe: HaystackRecipe) -> Manifest:
    """Writes ROOT/pool, or only the waves that are missing; the same rows on any number of workers."""
    return ingest_tables(
        Station(f"{recipe.root}/pool"),
        recipe,
        recipe.haystack.chunks(),
        chunk_table,
        {},
        WaveSettings(shards_per_wave=recipe.shards_per_wave, rows_per_file=recipe.rows_per_file),
    )
