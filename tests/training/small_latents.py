"""Latents of noise, as stations: what small trainings learn from."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

from emu_ray.records import SCHEMAS
from emu_ray.stations import Station


def write_latents(uri: str | os.PathLike[str], *, seed: int = 0, pairs: int = 14, side_px: int = 16) -> None:
    """A `latents` station of squares for the small pipeline: latents of 4 channels, a quarter of the side. Keys are 0, 1, ..."""
    numbers = 4 * (side_px // 4) ** 2
    station, noise = Station(uri), np.random.default_rng(seed)
    station.begin("any", "{}", "latents", {})
    rows = {
        "key": range(pairs),
        "bucket": [f"{side_px}x{side_px}"] * pairs,
        "latent_mean": list(noise.standard_normal((pairs, numbers)).astype(np.float16)),
        "latent_std": [np.ones(numbers, np.float16)] * pairs,
        "caption": [f"ball {i}" for i in range(pairs)],
    }
    table = pa.table({field.name: pa.array(rows[field.name], field.type) for field in SCHEMAS["latents"]})
    station.write_table("part-000000.parquet", table)
    station.finish()
