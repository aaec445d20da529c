"""The train function under Ray Train: 1..n workers, checkpoints through Ray, the result as a station.

The run's name carries the recipe and the inputs, so the same command resumes its own checkpoints and no other's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from emu_ray.config import fingerprint, from_json, require_at_least, to_json
from emu_ray.stations import Manifest, Station
from emu_ray.stations.manifest import identity


@dataclass(frozen=True, kw_only=True)
class WorkersRecipe:
    """How many processes train, and on what. The result does not depend on it beyond rounding."""

    count: int = 1
    use_gpu: bool = False
    cpus_each: float = 1
    threads_each: int = 1
    max_failures: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, 1, "count")


class RayWorker:
    """One Ray Train worker: checkpoints are Ray's, a line of progress goes to the driver's log."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def restore(self) -> dict[str, Any] | None:
        """The last committed checkpoint, also after a crash, on any number of workers."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Reports on every rank; rank 0 brings the state."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / "state.pt")
            name = f"step-{int(metrics['step']):08d}"
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder), checkpoint_dir_name=name)

    def log(self, metrics: dict[str, float]) -> None:
        """One line on rank 0."""
        if self.rank == 0:
            print(progress_line(metrics), flush=True)


def progress_line(metrics: dict[str, float]) -> str:
    """`step 200  loss 0.123 ...  85 images/s  eta 3:20`."""
    parts = [f"step {int(metrics['step'])}"]
    for name, value in metrics.items():
        if name in {"step", "images_seen"}:
            continue
        if name == "eta_s":
            parts.append(f"eta {int(value) // 60}:{int(value) % 60:02d}")
        elif name == "images_per_s":
            parts.append(f"{value:.0f} images/s")
        else:
            parts.append(f"{name} {value:.4f}")
    return "  ".join(parts)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run as Ray sees it: `work` runs on each worker with (recipe, inputs), and writes its result into the folder it is given."""

    target: str  # URI of the station
    recipe: Any
    inputs: dict[str, str]
    work: Callable[[Any, RayWorker, Path], dict[str, Any]]
    workers: WorkersRecipe
    schema: str = "checkpoint"
    storage: str = field(default="", metadata={"affects_result": False})


def run_training(job: TrainJob) -> Manifest:
    """Trains and writes the station, or resumes, or does nothing when it is finished. The manifest's `extra` is what `work` returned."""
    station = Station(job.target)
    mark = fingerprint(job.recipe)
    if not station.begin(mark, to_json(job.recipe), job.schema, job.inputs):
        print(f"{station.uri}: finished before; nothing to do", flush=True)
        return station.require()
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={
            "work": job.work,
            "recipe_json": to_json(job.recipe),
            "recipe_class": type(job.recipe),
            "target": job.target,
            "threads": job.workers.threads_each,
        },
        scaling_config=ScalingConfig(
            num_workers=job.workers.count,
            use_gpu=job.workers.use_gpu,
            resources_per_worker={"CPU": job.workers.cpus_each, **({"GPU": 1} if job.workers.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{Path(job.target).name}-{identity(job.schema, mark, job.inputs)}",
            storage_path=job.storage,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=job.workers.max_failures),
        ),
    )
    trainer.fit()
    summary = json.loads(station.get_bytes("summary.json"))
    return station.finish(extra=summary)


def _on_worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["threads"])
    worker = RayWorker()
    recipe = from_json(config["recipe_class"], config["recipe_json"])
    with tempfile.TemporaryDirectory() as folder:
        summary = config["work"](recipe, worker, Path(folder))
        if worker.rank == 0:
            station = Station(config["target"])
            station.upload_folder(folder)
            station.put_file("summary.json", json.dumps(summary).encode())
