"""Makes the base that the demo starts from: small CLIP and T5, autoencoder, pretrained U-Net, heads and judge.

reads    nothing: every draw of the haystack is generated
writes   ROOT/weights, the folder that ships as emu_ray/base/weights
command  python -m jobs.make_base
cost     a few hours on 2 cores; resumable: the same command goes on where it ended

ROOT/parts holds what pretraining starts from, and doesn't change once that has begun; ROOT/weights is put together from it at the end.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from emu_ray.base.heads import fit_heads
from emu_ray.base.judge import JudgeRecipe, make_faithfulness_judge
from emu_ray.base.recipes import base_pretraining
from emu_ray.base.text import make_clip, make_t5
from emu_ray.base.written_whole import written_whole
from emu_ray.config import command_line
from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import JobFailedError
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.session.on_ray import quiet
from emu_ray.training.on_ray import progress_line


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """Where the base is made."""

    root: str


RECIPES = {"base": BaseRecipe(root="runs/base")}


def jobs_before_vae(root: Path) -> list[list[str]]:
    """What follows `python -m` and `jobs.`: the autoencoder learns shapes on one draw, textures on another."""
    first, second = f"{root}/autoencoder-1", f"{root}/autoencoder-2"
    return [
        ["ingest", "base-autoencoder-1", "--root", first],
        ["train_autoencoder", "base", "--root", first],
        ["ingest", "base-autoencoder-2", "--root", second],
        ["train_autoencoder", "base-sharper", "--root", second, "--training.start", f"{first}/autoencoder"],
    ]


def jobs_after_vae(root: Path) -> list[list[str]]:
    """The U-Net learns on one draw from the other parts, then on a larger draw from where it was."""
    first, longer = f"{root}/pretrain", f"{root}/pretrain-longer"
    return [
        ["ingest", "base-pretrain", "--root", first],
        ["encode", "base", "--root", first, "--autoencoder", f"{root}/parts/vae"],
        ["pretrain", "base", "--root", first, "--training.start", f"{root}/parts"],
        ["ingest", "base-pretrain-longer", "--root", longer],
        ["encode", "base-longer", "--root", longer, "--autoencoder", f"{root}/parts/vae"],
        ["pretrain", "base-longer", "--root", longer, "--training.start", f"{first}/checkpoints/base"],
    ]


def run(recipe: BaseRecipe) -> None:
    """Every part in order; what is there already stays."""
    quiet()
    torch.set_num_threads(1)
    root = Path(recipe.root)
    parts, weights = root / "parts", root / "weights"
    if (weights / "unet").exists():
        print(f"{weights}: finished before; nothing to do", flush=True)
        return
    make_small_parts(parts, root / "work")
    for arguments in jobs_before_vae(root):
        _job(arguments)
    if not (parts / "vae").exists():
        vae = FourierAutoencoder.from_pretrained(root / "autoencoder-2" / "autoencoder")
        with written_whole(parts / "vae") as half:
            vae.half().save_pretrained(half)
    for arguments in jobs_after_vae(root):
        _job(arguments)
    finish(root / "pretrain-longer" / "checkpoints" / "base", parts, weights)
    size_mb = sum(f.stat().st_size for f in weights.rglob("*") if f.is_file()) / 1e6
    print(f"base: {size_mb:.1f} MB at {weights}", flush=True)


def make_small_parts(parts: Path, work: Path) -> None:
    """Everything but the autoencoder and the U-Net."""

    def log(metrics: dict[str, float]) -> None:
        print(progress_line(metrics), flush=True)

    make_t5(parts, work, log)
    make_clip(parts, work, log)
    if not (parts / "heads").exists():
        print(fit_heads(parts), flush=True)
    make_faithfulness_judge(parts, work, JudgeRecipe())
    if not (parts / "scheduler").exists():  # a pipeline is read from a folder that has one
        with written_whole(parts / "scheduler") as half:
            NoiseSchedule(base_pretraining().schedule or ScheduleRecipe()).scheduler().save_pretrained(half)


def finish(checkpoint: Path, parts: Path, weights: Path) -> None:
    """`weights`: the pretrained pipeline's U-Net, scheduler and index in half precision, and the other parts as they are."""
    pipeline = EmuPipeline.load(checkpoint)
    pipeline.to(dtype=torch.float16)
    with written_whole(weights) as half:
        pipeline.save_pretrained(half)
        shutil.copytree(parts, half, ignore=shutil.ignore_patterns("scheduler"), dirs_exist_ok=True)


def _job(arguments: list[str]) -> None:
    job, recipe = arguments[:2]
    print(f"make_base: jobs.{job} {recipe}", flush=True)
    if subprocess.run([sys.executable, "-m", f"jobs.{job}", *arguments[1:]], check=False).returncode:
        raise JobFailedError(
            f"jobs.{job} {recipe} failed: its message stands above; the same command goes on from here"
        )


if __name__ == "__main__":
    command_line("make_base", __doc__ or "", RECIPES, run, sys.argv[1:] or ["base"])
