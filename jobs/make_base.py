"""Makes the base that the demo starts from: small CLIP and T5, autoencoder, pretrained U-Net, heads and judge.

reads    nothing: every draw of the haystack is generated
writes   runs/base/weights, the folder that ships as emu_ray/base/weights
command  python -m jobs.make_base
cost     a few hours on 2 cores; resumable: the same command goes on where it ended
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
from emu_ray.base.text import make_clip, make_t5
from emu_ray.config import command_line
from emu_ray.errors import EmuRayError
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.session.on_ray import quiet
from emu_ray.training.on_ray import progress_line


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """Where the base is made."""

    root: str


RECIPES = {"base": BaseRecipe(root="runs/base")}

JOBS_BEFORE_VAE = (
    ("ingest", "base-autoencoder-1"),
    ("train_autoencoder", "base"),
    ("ingest", "base-autoencoder-2"),
    ("train_autoencoder", "base-sharper"),
)
JOBS_AFTER_VAE = (("ingest", "base-pretrain"), ("encode", "base"), ("pretrain", "base"))
JOBS_OF_THE_LONGER_PRETRAINING = (
    ("ingest", "base-pretrain-longer"),
    ("encode", "base-longer"),
    ("pretrain", "base-longer"),
)


def run(recipe: BaseRecipe) -> None:
    """Every part in order; what is there already stays."""
    quiet()
    torch.set_num_threads(1)
    weights, work = Path(recipe.root) / "weights", Path(recipe.root) / "work"
    weights.mkdir(parents=True, exist_ok=True)

    def log(metrics: dict[str, float]) -> None:
        print(progress_line(metrics), flush=True)

    make_t5(weights, work, log)
    make_clip(weights, work, log)
    if not (weights / "heads").exists():
        print(fit_heads(weights), flush=True)
    make_faithfulness_judge(weights, work, JudgeRecipe())
    for job, name in JOBS_BEFORE_VAE:
        _job(job, name)
    if not (weights / "vae").exists():
        vae = FourierAutoencoder.from_pretrained(Path(recipe.root) / "autoencoder-2" / "autoencoder")
        vae.half().save_pretrained(weights / "vae")
    for job, name in JOBS_AFTER_VAE + JOBS_OF_THE_LONGER_PRETRAINING:
        _job(job, name)
    finish(Path(recipe.root) / "pretrain-longer" / "checkpoints" / "base", weights)
    print(
        f"base: {sum(f.stat().st_size for f in weights.rglob('*') if f.is_file()) / 1e6:.1f} MB at {weights}",
        flush=True,
    )


def finish(checkpoint: Path, weights: Path) -> None:
    """The pretrained pipeline's U-Net, scheduler and index in half precision beside the other parts."""
    half = weights.parent / "half"
    pipeline = EmuPipeline.load(checkpoint)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(half)
    for name in ("unet", "scheduler", "model_index.json", "pipeline.py"):
        if (weights / name).is_dir():
            shutil.rmtree(weights / name)
        shutil.move(half / name, weights / name)
    shutil.rmtree(half)


def _job(job: str, name: str) -> None:
    print(f"make_base: jobs.{job} {name}", flush=True)
    if subprocess.run([sys.executable, "-m", f"jobs.{job}", name], check=False).returncode:
        raise EmuRayError(f"jobs.{job} {name} failed: its message stands above; the same command goes on from here")


if __name__ == "__main__":
    command_line("make_base", __doc__ or "", RECIPES, run, sys.argv[1:] or ["base"])
