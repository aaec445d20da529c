"""A finished `pool` station of given pairs, dealt to several files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

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
