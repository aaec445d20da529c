"""The train function under Ray Train: 1..n workers, restarts after failures, curves, the result as a station.

The run's name carries the recipe and the inputs, so the same command resumes its own checkpoints and no other's. Checkpoints are ours
(`checkpoints.py`), below the run's own folder: Ray's asynchronous upload was seen to lose the last one in a kill.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import ray.train
import torch
from ray.experimental import tqdm_ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.metrics import Gauge

from emu_ray import errors
from emu_ray.config import fingerprint, from_json, require_at_least, to_json
from emu_ray.errors import (
    CheckpointError,
    DivergedError,
    EmuRayError,
    InputError,
    JobFailedError,
    NumericsError,
    RecipeError,
    SchemaError,
    StationConflictError,
    find_in_chain,
    first_line,
)
from emu_ray.stations import Manifest, Station, Store
from emu_ray.stations.manifest import identity
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.logbook.loggers import LogbookRecipe
from emu_ray.training.logbook.on_ray import LogbookKeeper, death
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.ownership import Ownership


@dataclass(frozen=True, kw_only=True)
class WorkersRecipe:
    """How many processes train, and on what. The result does not depend on it beyond rounding."""

    count: int = 1
    # Train on as few as these while the cluster has no more, and grow to `count`; each change goes back to the last checkpoint.
    # None: wait for all.
    least: int | None = None
    look_for_more_every_s: float = (
        60  # of a run with `least`: how often it asks whether the cluster has room for more workers
    )
    use_gpu: bool = False
    cpus_each: float = 1
    threads_each: int = 1
    max_failures: int = 2  # crashes of a worker; a spot machine that is taken away doesn't count
    logbook: LogbookRecipe = LogbookRecipe()

    def __post_init__(self) -> None:
        require_at_least(self, 1, "count", "least", "threads_each", "look_for_more_every_s")
        if self.least is not None and self.least > self.count:
            raise RecipeError(f"least of WorkersRecipe must not be above count, found {self.least} and {self.count}")


class RayWorker:
    """One Ray Train worker: its figures go to the driver's log, to Ray's metrics and to the run's logbook."""

    def __init__(self, storage: str, driver: str, is_live: bool = False) -> None:
        """`storage` is the run's own folder, which `driver` owns; `is_live` draws a progress bar in the driver's terminal."""
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.storage, self.driver, self.name = storage, driver, context.get_experiment_name()
        self._kept: Checkpoints | None = None
        self._gauges: dict[str, Gauge] = {}
        self._points: list[dict[str, float]] = []
        self._bar: Any = None
        self._is_live = is_live and self.rank == 0

    def checkpoints(self) -> Checkpoints:
        """The run's committed checkpoints, of any number of workers."""
        folder = f"{self.storage}/checkpoints"
        self._kept = Checkpoints(
            folder, rank=self.rank, world_size=self.world_size, ownership=Ownership(folder, self.driver)
        )
        return self._kept

    def require_owned(self) -> None:
        """StationConflictError, on all ranks, when the same run was started again elsewhere."""
        if self._kept is not None:
            self._kept.require_owned()

    def log(self, metrics: dict[str, float]) -> None:
        """On rank 0 a line or the bar, and Ray's metrics; the logbook gets it by `publish`."""
        if self.rank == 0:
            if self._is_live:
                self._draw(metrics)
            else:
                print(progress_line(metrics), flush=True)
            for name, value in metrics.items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        f"emu_ray_training_{name}", "training, see the README", tag_keys=("run",)
                    )
                self._gauges[name].set(value, tags={"run": self.name})
        self._points.append(metrics)

    def publish(self, is_last: bool = False) -> None:
        """Reports the newest figures and, as rank 0's `points`, all since the last report."""
        if self._points:
            points = self._points if self.rank == 0 else []
            ray.train.report({**self._points[-1], "points": points, "is_last": is_last})
            self._points = []

    def is_ending(self) -> bool:
        """Whether Ray was told that a machine of this run will be taken away, such as a spot machine two minutes before its end."""
        return ray.train.get_preemption_info() is not None

    def show(self, png: bytes, images_seen: int) -> None:
        """Keeps a sheet of sample pictures below the run's folder, where the logbook finds it; for rank 0."""
        Store(f"{self.storage}/samples").put(f"images-{images_seen:012d}.png", png)

    def _draw(self, metrics: dict[str, float]) -> None:
        if "eta_s" not in metrics:
            print(progress_line(metrics), flush=True)
            return
        seen = int(metrics["images_seen"])
        if self._bar is None:
            self._bar = tqdm_ray.tqdm(total=seen + round(metrics["eta_s"] * metrics["images_per_s"]), unit=" images")
        self._bar.set_description(f"loss {metrics['loss']:.4f}")
        self._bar.update(seen - self._bar.n)


SHARES = ("data_share", "encode_share", "compute_share", "communication_share", "update_share", "checkpoint_share")


def progress_line(metrics: dict[str, float]) -> str:
    """`step 200  loss 0.123 ...  85 images/s  data 0 %  compute 93 % ...  eta 3:20`."""
    parts = [f"step {int(metrics['step'])}"]
    for name, value in sorted(metrics.items(), key=lambda item: item[0] != "loss"):  # which comes first
        if name in {"step", "images_seen", "learning_rate", "tflops_a_worker"}:
            continue
        if name == "eta_s":
            hours, rest = divmod(int(value), 3600)
            parts.append(
                f"eta {hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"eta {rest // 60}:{rest % 60:02d}"
            )
        elif name == "images_per_s":
            parts.append(f"{value:.3g} images/s")
        elif name in SHARES:
            if value >= 0.005:
                parts.append(f"{name.removesuffix('_share')} {value:.0%}")
        elif name in {"mfu", "goodput"}:
            parts.append(f"{name} {value:.1%}")
        elif name == "gpu_memory_gib":
            parts.append(f"{value:.1f} GiB")
        else:
            parts.append(f"{name} {value:.4f}")
    return "  ".join(parts)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run as Ray sees it: `work` runs on each worker with (recipe, worker, folder), and writes its result into that folder."""

    target: str  # URI of the station
    recipe: Any
    inputs: dict[str, str]
    work: Callable[[Any, RayWorker, Path], dict[str, Any]]
    workers: WorkersRecipe
    loop: LoopRecipe
    schema: str = "checkpoint"
    storage: str = field(default="", metadata={"affects_result": False})


def run_training(job: TrainJob) -> Manifest:
    """Trains and writes the station, or resumes, or does nothing when it is finished. The manifest's `extra` is what `work` returned."""
    job.workers.logbook.require_packages()
    station = Station(job.target)
    mark = fingerprint(job.recipe)
    if not station.begin(mark, to_json(job.recipe), job.schema, job.inputs):
        print(f"{station.uri}: finished before; nothing to do", flush=True)
        return station.require()
    workers, name = job.workers, f"{Path(job.target).name}-{identity(job.schema, mark, job.inputs)}"
    storage, driver = f"{job.storage}/{name}", uuid.uuid4().hex
    Ownership(f"{storage}/checkpoints", driver).begin()
    trainer = TorchTrainer(
        _on_worker,  # type: ignore[arg-type]
        train_loop_config={
            "work": _address(job.work),
            "recipe_json": to_json(job.recipe),
            "recipe_class": _address(type(job.recipe)),
            "target": job.target,
            "threads": workers.threads_each,
            "storage": storage,
            "driver": driver,
            "is_live": sys.stderr.isatty(),
        },
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=workers.count if workers.least is None else (workers.least, workers.count),  # type: ignore[arg-type]
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_each, **({"GPU": 1} if workers.use_gpu else {})},
            elastic_resize_monitor_interval_s=workers.look_for_more_every_s,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=job.storage,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[LogbookKeeper(workers.logbook, storage, json.loads(to_json(job.loop)))],  # type: ignore[list-item]
        ),
    )
    _fitted(trainer, workers, f"{storage}/checkpoints")
    summary = json.loads(station.get_bytes("summary.json"))
    return station.finish(extra=summary)


def _address(of: Any) -> str:
    """`module:name`, which Ray Train's controller can hold without the imports of what it names: seconds of each start."""
    return f"{of.__module__}:{of.__qualname__}"


# What another attempt would only find again. Ray Train tries whatever is raised: where other workers may wait for the one that failed, the
# next attempt returns what this one noted.
FINAL_ERRORS = (CheckpointError, InputError, NumericsError, RecipeError, SchemaError, StationConflictError)
NOTE = "failure.json"


def _on_worker(config: dict[str, Any]) -> EmuRayError | None:
    """The work, on each worker; an error that no further attempt would mend comes back as a value."""
    store, driver = Store(config["storage"]), config["driver"]
    if noted := store.get(NOTE):
        by, kind, message = json.loads(noted)
        if by == driver:
            return getattr(errors, kind)(message)
    torch.set_num_threads(config["threads"])
    _silence_reports()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler complains of GPUs that aren't there
    worker = RayWorker(config["storage"], driver, is_live=config["is_live"])
    recipe, work = from_json(resolve_name(config["recipe_class"]), config["recipe_json"]), resolve_name(config["work"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            summary = work(recipe, worker, Path(folder))
            worker.require_owned()
            if worker.rank == 0:
                station = Station(config["target"])
                station.upload_folder(folder)
                station.put_file("summary.json", json.dumps(summary).encode())
    except Exception as error:
        final = find_in_chain(error)  # it may have come from a task of Ray Data
        if not isinstance(final, FINAL_ERRORS):
            raise
        kind = next(cls.__name__ for cls in type(final).__mro__ if cls.__module__ == errors.__name__)
        if worker.world_size == 1 or isinstance(final, DivergedError):  # no other worker waits for this one
            return getattr(errors, kind)(str(final))
        store.put(NOTE, json.dumps([driver, kind, str(final)]).encode())
        raise
    return None


def _silence_reports() -> None:
    """Ray 2.60 says each report again on every worker, by a logger that it names after its file, so that no log level reaches it."""
    for name in list(logging.root.manager.loggerDict):
        if name.endswith("ray/train/v2/_internal/execution/context.py"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _fitted(trainer: TorchTrainer, workers: WorkersRecipe, checkpoints: str) -> None:
    """Trains; raises our own errors as they were on the worker, and JobFailedError for workers that died too often."""
    try:
        failure = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        if is_loss_of_a_worker(error):
            raise JobFailedError(
                f"workers died more than {workers.max_failures} times, which is max_failures; the last cause: {_cause(error)}. What was "
                f"reached lies at {checkpoints}: the same command goes on from there"
            ) from error
        raise
    if isinstance(failure, EmuRayError):
        raise failure


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "NCCL communicator was aborted")


def is_loss_of_a_worker(error: BaseException) -> bool:
    """Whether processes or machines died, or lost their connection since others did; False for an error that the code raised."""
    found = list(getattr(error, "worker_failures", {}).values())
    return bool(found) and all(death(one) or any(words in str(one) for words in LOST_PEER) for one in found)


def _cause(error: BaseException) -> str:
    """The first line that says most: of a worker that died rather than of those that missed it."""
    found = list(getattr(error, "worker_failures", {}).values())
    died = [cause for one in found if (cause := death(one))]
    return first_line((died or found)[0])
