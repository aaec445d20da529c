"""Deploys the tuned and the pretrained model over HTTP: on a cluster it returns when they answer, else it stays up until Ctrl+C.

reads    ROOT/checkpoints/tuned and base; ROOT/evaluation, if it is finished
writes   ROOT/votes, of blind comparisons on its page; on a cluster the service stays up until `serve shutdown` or the cluster ends
command  python -m jobs.serve demo --port 8000
cost     demo: one core while it draws, 2 GB
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Literal

from emu_ray.config import absolute, command_line
from emu_ray.session.on_ray import connect
from emu_ray.stations import Station
from serve.args import ServeArgs
from serve.deploy import deploy


@dataclass(frozen=True, kw_only=True)
class ServeRecipe:
    """Which checkpoints answer, and where."""

    root: str
    host: str = "127.0.0.1"
    port: int = 8000
    num_cpus: float = 0.5  # of the replica that draws; it shares the demo's two cores with whatever else runs
    num_gpus: float = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of U-Nets and text encoders
    keys_file: str | None = None  # of `python -m jobs.api_key`; None lets everybody ask


RECIPES = {
    "demo": ServeRecipe(root="runs/demo"),
    "emu": ServeRecipe(root="runs/emu", host="0.0.0.0", num_cpus=8, num_gpus=1, dtype="bfloat16"),
}


def run(recipe: ServeRecipe) -> None:
    """Deploy and say where; on a Ray of its own, stay up until Ctrl+C."""
    own = connect(recipe.num_gpus)
    evaluation = Station(f"{recipe.root}/evaluation")
    args = ServeArgs(
        checkpoint=f"{recipe.root}/checkpoints/tuned",
        base_checkpoint=f"{recipe.root}/checkpoints/base",
        evaluation=evaluation.uri if evaluation.is_finished() else None,
        votes=Station(f"{recipe.root}/votes").uri,
        num_cpus=recipe.num_cpus,
        num_gpus=recipe.num_gpus,
        dtype=recipe.dtype,
        keys_file=None if recipe.keys_file is None else absolute(recipe.keys_file, "--keys-file"),
    )
    print(f"serving at {deploy(args, recipe.port, recipe.host)}", flush=True)
    if own:
        print("The service stays up until Ctrl+C.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    command_line("serve", __doc__ or "", RECIPES, run)
