"""Curves of a run for people: TensorBoard by default, MLflow and Weights & Biases by recipe. No Ray here."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu_ray.errors import RecipeError
from emu_ray.stations import Store

UPLOAD_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class LogbookRecipe:
    """Where the curves go."""

    tensorboard: bool = field(default=True, metadata={"affects_result": False})
    mlflow_uri: str | None = field(
        default=None, metadata={"affects_result": False}
    )  # e.g. http://mlflow:5000, or a folder
    wandb_project: str | None = field(default=None, metadata={"affects_result": False})

    def require_packages(self) -> None:
        """RecipeError for a logger whose package isn't installed; for the driver."""
        for package, is_wanted, setting in (
            ("mlflow", self.mlflow_uri, "mlflow_uri"),
            ("wandb", self.wandb_project, "wandb_project"),
        ):
            if is_wanted and importlib.util.find_spec(package) is None:
                raise RecipeError(
                    f"{setting} needs the package {package}, which is not installed: pip install {package}, or leave {setting} out"
                )


class Logbook:
    """The loggers that a recipe asks for; the same name goes on with the same curves after a restart."""

    def __init__(self, recipe: LogbookRecipe, folder: str, name: str, settings: dict[str, Any]) -> None:
        """`folder` takes the TensorBoard files, a directory or an s3:// address; `settings` are shown beside the curves."""
        self.store, self._here = Store(folder), Path(folder)
        self._tensorboard: Any = None
        self._uploaded = -math.inf
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if not self.store.is_local:
                self._here = Path(tempfile.mkdtemp(prefix="emu_ray-tensorboard-"))
            self._tensorboard = SummaryWriter(str(self._here))
        self._mlflow = _mlflow_run(recipe.mlflow_uri, name, settings) if recipe.mlflow_uri else None
        self._wandb = _wandb_run(recipe.wandb_project, name, settings) if recipe.wandb_project else None

    def write(self, metrics: dict[str, float]) -> None:
        """One point of each curve, at `images_seen`."""
        at = int(metrics["images_seen"])
        curves = {
            name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name != "images_seen"
        }
        if self._tensorboard is not None:
            for name, value in curves.items():
                self._tensorboard.add_scalar(name, value, at)
        if self._mlflow is not None:
            client, run = self._mlflow
            for name, value in curves.items():
                client.log_metric(run, name, value, step=at)
        if self._wandb is not None:
            self._wandb.log({**curves, "images_seen": at})

    def picture(self, png: bytes, images_seen: int) -> None:
        """A sheet of sample pictures."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        if self._tensorboard is not None:
            self._tensorboard.add_image("samples", pixels, images_seen, dataformats="HWC")
        if self._mlflow is not None:
            client, run = self._mlflow
            client.log_image(run, pixels, f"samples-{images_seen:012d}.png")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(pixels), "images_seen": images_seen})

    def flush(self, is_last: bool) -> None:
        """Makes what was written readable; on S3, whose files are put there whole, once a minute and at the end."""
        if self._tensorboard is not None:
            self._tensorboard.flush()
            if not self.store.is_local and (is_last or time.monotonic() > self._uploaded + UPLOAD_EVERY_S):
                for file in self._here.iterdir():
                    self.store.put(file.name, file)
                self._uploaded = time.monotonic()
        if is_last and self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _mlflow_run(uri: str, name: str, settings: dict[str, Any]) -> tuple[Any, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("emu_ray")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("emu_ray")
    earlier = client.search_runs([experiment_id], f"attributes.run_name = '{name}'", max_results=1)
    if earlier:
        return client, earlier[0].info.run_id
    run = client.create_run(experiment_id, run_name=name)
    for setting, value in settings.items():
        client.log_param(run.info.run_id, setting, str(value)[:500])
    return client, run.info.run_id


def _wandb_run(project: str, name: str, settings: dict[str, Any]) -> Any:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(project=project, id=name, name=name, resume="allow", config=settings)
    run.define_metric("*", step_metric="images_seen")  # W&B's own steps must grow, and a restart goes back
    return run
