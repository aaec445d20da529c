"""Fetches the two frozen text encoders that pretraining starts from, and the noise schedule beside them.

reads    hub names, or folders in transformers layout
writes   ROOT/start: text_encoder, tokenizer, text_encoder_2, tokenizer_2, scheduler
command  python -m jobs.text_encoders emu --root s3://bucket/run
cost     emu: 20 GB of T5-XXL to download and keep in memory once, no GPU; not run by us: no hub can be reached here
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from emu_ray.config import command_line, fingerprint, to_json
from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.models.text import TextEncoderSource, fetch_text_encoders
from emu_ray.session.on_ray import quiet
from emu_ray.stations import Station


@dataclass(frozen=True, kw_only=True)
class TextEncodersRecipe:
    """`encoders` -> `root`/start."""

    root: str
    encoders: TextEncoderSource = TextEncoderSource()
    schedule: ScheduleRecipe = ScheduleRecipe()


RECIPES = {"emu": TextEncodersRecipe(root="runs/emu")}


def run(recipe: TextEncodersRecipe) -> None:
    """Fetch, unless it was done before."""
    quiet()
    station = Station(f"{recipe.root}/start")
    if not station.begin(fingerprint(recipe), to_json(recipe), "start", {}):
        print(f"{station.uri}: finished before; nothing to do", flush=True)
        return
    print(f"text_encoders: {recipe.encoders.clip} and {recipe.encoders.t5}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch_text_encoders(recipe.encoders, Path(folder))
        NoiseSchedule(recipe.schedule).scheduler().save_pretrained(Path(folder) / "scheduler")
        station.upload_folder(folder)
    manifest = station.finish()
    print(f"start: {sum(manifest.files.values()) / 1e9:.2f} GB in {manifest.seconds:.0f} s at {manifest.station}")


if __name__ == "__main__":
    command_line("text_encoders", __doc__ or "", RECIPES, run)
