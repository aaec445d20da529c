"""A run without Ray: checkpoints in a folder. For tests, and for networks that train in minutes inside another job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from emu_ray.training.checkpoints import Checkpoints


class LocalWorker:
    """One process; folder None keeps no checkpoints."""

    rank, world_size = 0, 1

    def __init__(
        self,
        folder: Path | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder, self.device = folder, torch.device(device)
        self._log = log

    def checkpoints(self) -> Checkpoints | None:
        """Those below the folder."""
        if self.folder is None:
            return None
        return Checkpoints(self.folder, rank=self.rank, world_size=self.world_size)

    def log(self, metrics: dict[str, float]) -> None:
        """Hands a line of metrics on."""
        if self._log:
            self._log(metrics)

    def publish(self, is_last: bool = False) -> None:
        """Nothing is held back."""

    def is_ending(self) -> bool:
        """Never: nobody tells it."""
        return False
