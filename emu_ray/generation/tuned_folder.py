"""The folder of a tuned published base: the U-Net is new, every other part is the base's own file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from emu_ray.diffusion.schedule import schedule_of
from emu_ray.generation.parts import files_read
from emu_ray.generation.schedulers import read_scheduler
from emu_ray.generation.weight_headers import stored_variant, weights_stem
from emu_ray.models.hub import read_json

INDEX = "model_index.json"


def save_tuned_like(pipeline: Any, base: Path, folder: Path) -> None:
    """Writes `pipeline`, tuned from `base`, so that plain diffusers loads it as the same class.

    The scheduler is the base's own file unless the pipeline's means another noise schedule. A part that `base` has only in half precision
    is written in full, so that no variant need be named.
    """
    index = read_json(base / INDEX)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.unet.save_pretrained(folder / "unet")
    if _is_rescheduled(pipeline, base):
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(pipeline.scheduler).__name__]
    else:
        _copy_part(base / "scheduler", folder / "scheduler")
    for part, named in index.items():
        if part in ("unet", "scheduler") or not isinstance(named, list) or named[0] is None:
            continue
        names = {file.name for file in (base / part).iterdir()}
        if stored_variant(names, weights_stem(part)) == "fp16" and getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).save_pretrained(folder / part)
        else:
            _copy_part(base / part, folder / part)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_rescheduled(pipeline: Any, base: Path) -> bool:
    before = read_scheduler(base / "scheduler")
    return schedule_of(pipeline.scheduler.config, "the tuned scheduler") != schedule_of(before.config, str(base))


def _copy_part(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in files_read(source):
        shutil.copyfile(file, target / file.name)
