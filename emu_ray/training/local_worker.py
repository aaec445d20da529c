"""A run without Ray: one process, checkpoints in a folder. For tests, and for networks that train in minutes inside another job."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class LocalWorker:
    """Keeps the newest checkpoint as `folder`/state.pt, replaced in one rename; folder None keeps none."""

    rank, world_size = 0, 1

    def __init__(
        self,
        folder: Path | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder, self.device = folder, torch.device(device)
        self._log = log

    def restore(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None."""
        path = self.folder / "state.pt" if self.folder else None
        return torch.load(path, map_location="cpu", weights_only=True) if path and path.exists() else None

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Replaces the checkpoint."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        half = self.folder / "state.pt.part"
        torch.save(state, half)
        os.replace(half, self.folder / "state.pt")

    def log(self, metrics: dict[str, float]) -> None:
        """Hands a line of metrics on."""
        if self._log:
            self._log(metrics)
