"""Takes a published base model, Stable Diffusion 1.x, 2.x or SDXL, as the start of quality-tuning.

reads    a diffusers folder, here or on s3://, or a hub's name: --source
writes   ROOT/start: the files that are read, and no others
command  python -m jobs.import_base sd15 --root runs/sd15
cost     sd15: 4 GB, sdxl: 14 GB to download or copy; no GPU; the hub was not reachable where this was built

The folder is judged before it is copied: class, layout, noise schedule, whole weights. No code in it is run, and no pickle is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu_ray.config import command_line, fingerprint, to_json
from emu_ray.generation.base_folder import require_base
from emu_ray.generation.import_base import base_files, base_folder_of, digest_of
from emu_ray.session.on_ray import quiet
from emu_ray.stations import Station


@dataclass(frozen=True, kw_only=True)
class ImportRecipe:
    """`source` -> `root`/start."""

    root: str
    source: str


RECIPES = {
    "sd15": ImportRecipe(root="runs/sd15", source="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": ImportRecipe(root="runs/sd21", source="stabilityai/stable-diffusion-2-1"),
    "sdxl": ImportRecipe(root="runs/sdxl", source="stabilityai/stable-diffusion-xl-base-1.0"),
}


def run(recipe: ImportRecipe) -> None:
    """Fetch and judge, unless it was done before."""
    quiet()
    folder = base_folder_of(recipe.source)
    base = require_base(str(folder))
    files = base_files(folder, base.family)
    station = Station(f"{recipe.root}/start")
    if not station.begin(fingerprint(recipe), to_json(recipe), "start", {"source": digest_of(files)}):
        print(f"{station.uri}: finished before; nothing to do", flush=True)
        return
    print(f"import_base: {recipe.source} is a {base.family.pipeline_class.__name__}, {base.schedule}", flush=True)
    for name, file in files.items():
        station.put_file(name, file)
    manifest = station.finish()
    print(f"start: {sum(manifest.files.values()) / 1e9:.2f} GB in {manifest.seconds:.0f} s at {manifest.station}")


if __name__ == "__main__":
    command_line("import_base", __doc__ or "", RECIPES, run)
