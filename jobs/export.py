"""Hands the selection, or what people chose, to other programs: lists of keys, WebDataset tars, or Parquet files.

reads    ROOT/selection (or ROOT/chosen) and, except for ids, ROOT/pool and ROOT/scores
writes   ROOT/export/FORMAT: ids.txt and ids.csv, 000000.tar ..., or part-00000.parquet ..., best rank first
command  python -m jobs.export demo; python -m jobs.export parquet --root s3://bucket/run --source chosen
cost     reads the row groups of the pool that hold what was kept, writes it once, decodes no picture; temporary disk as large as the export
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.curation.exporting import ExportRecipe, export

RECIPES = {
    "demo": ExportRecipe(root="runs/demo"),
    "ids": ExportRecipe(root="runs/mine", format="ids"),
    "webdataset": ExportRecipe(root="runs/mine", format="webdataset"),
    "parquet": ExportRecipe(root="runs/mine", format="parquet"),
}


def run(recipe: ExportRecipe) -> None:
    """Export and say how much."""
    manifest = export(recipe)
    counts = manifest.counts
    print(
        f"export: {counts['rows']} rows, {counts['bytes'] / 1e6:.1f} MB in {counts['files']} files at {manifest.station}"
    )


if __name__ == "__main__":
    command_line("export", __doc__ or "", RECIPES, run)
