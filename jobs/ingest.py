"""Reads a source of captioned images and writes the station `pool`, every image once, with a stable key.

reads    --source: a folder of images with .txt captions, WebDataset tars or Parquet files, local or s3://; demo: a generated haystack
writes   ROOT/pool
command  python -m jobs.ingest stamps; python -m jobs.ingest folder --source DIR --root runs/mine
cost     no GPU, no decoding: reading and writing the bytes once; the 398 stamps take about 10 s, most of it Ray's start
"""

from __future__ import annotations

from emu_ray.base.draws import (
    AUTOENCODER_PICTURES,
    PRETRAIN_LONGER_PICTURES,
    PRETRAIN_PICTURES,
    SEEDS,
    SIZE_PX,
)
from emu_ray.config import command_line
from emu_ray.haystack.on_ray import HaystackRecipe, generate
from emu_ray.haystack.pool import HaystackSource, PlantedShares
from emu_ray.ingest.on_ray import IngestRecipe, ingest
from emu_ray.session.on_ray import connect

NO_DEFECTS = PlantedShares(
    overlaid_text=0, mismatched_caption=0, offensive=0, too_small=0, extreme_aspect=0, exact_duplicate=0, near_duplicate=0, undecodable=0
)  # fmt: skip


def _draw(name: str, rows: int, photogenic_share: float | None = None) -> HaystackSource:
    return HaystackSource(
        rows=rows, side_px=SIZE_PX, seed=SEEDS[name], planted=NO_DEFECTS, photogenic_share=photogenic_share
    )


RECIPES: dict[str, IngestRecipe | HaystackRecipe] = {
    "demo": HaystackRecipe(root="runs/demo", haystack=HaystackSource(rows=4500, seed=SEEDS["pool"])),
    "stamps": IngestRecipe(root="runs/stamps", source="../shared/data/stamps", layout="webdataset"),
    "folder": IngestRecipe(root="runs/folder", source="images"),
    # The draws that the base learns from; see jobs.make_base.
    "base-autoencoder-1": HaystackRecipe(root="runs/base/autoencoder-1", haystack=_draw("autoencoder", AUTOENCODER_PICTURES)),
    "base-autoencoder-2": HaystackRecipe(root="runs/base/autoencoder-2", haystack=_draw("autoencoder_sharper", AUTOENCODER_PICTURES, 0.5)),
    "base-pretrain": HaystackRecipe(root="runs/base/pretrain", haystack=_draw("pretrain", PRETRAIN_PICTURES)),
    "base-pretrain-longer": HaystackRecipe(root="runs/base/pretrain-longer", haystack=_draw("pretrain_longer", PRETRAIN_LONGER_PICTURES)),
}  # fmt: skip


def run(recipe: IngestRecipe | HaystackRecipe) -> None:
    """Ingest and say what the pool holds."""
    connect()
    manifest = ingest(recipe) if isinstance(recipe, IngestRecipe) else generate(recipe)
    counts = ", ".join(f"{name} {count}" for name, count in manifest.counts.items())
    print(
        f"pool: {counts}; {sum(manifest.files.values()) / 1e6:.1f} MB in {manifest.seconds:.1f} s at {manifest.station}"
    )


if __name__ == "__main__":
    command_line("ingest", __doc__ or "", RECIPES, run)
