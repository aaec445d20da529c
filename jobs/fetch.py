"""Fetches the pictures of a list of URLs with captions and writes the station `pool`, one row for each URL.

reads    --source: Parquet, CSV, TSV or JSON lines with a column of URLs, a file or a folder of them, local or s3://
writes   ROOT/pool, the bytes as they were served; a URL that gave no picture keeps its row and a reason in `fetch_error`
command  python -m jobs.fetch urls --source urls.parquet --root runs/mine
cost     no GPU; a task has 64 requests under way, at most 4 to a host, and waits at most 10 minutes for its 2,000 URLs;
         pictures that stand for missing ones are told only by digests that you give (--placeholders): none are built in
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.fetching.on_ray import FetchRecipe, fetch
from emu_ray.fetching.reasons import FETCH_REASONS
from emu_ray.session.on_ray import connect

RECIPES: dict[str, FetchRecipe] = {"urls": FetchRecipe(root="runs/urls", source="urls.parquet")}


def run(recipe: FetchRecipe) -> None:
    """Fetch and say what the pool holds."""
    connect()
    manifest = fetch(recipe)
    failed = {reason: manifest.counts.get(f"fetch_{reason}", 0) for reason in FETCH_REASONS}
    fetched = manifest.counts["rows"] - sum(failed.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in failed.items() if count) or "none"
    print(
        f"pool: {manifest.rows} URLs, {fetched} fetched; not fetched: {reasons}; "
        f"{sum(manifest.files.values()) / 1e6:.1f} MB in {manifest.seconds:.1f} s at {manifest.station}"
    )


if __name__ == "__main__":
    command_line("fetch", __doc__ or "", RECIPES, run)
