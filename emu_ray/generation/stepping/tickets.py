"""A drawing that was asked for, on its way, and who looks on: the same for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from emu_ray.errors import EmuRayError
from emu_ray.models.text import TextFeatures


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture that is asked for."""

    prompt: str
    seed: int
    steps: int = 25
    guidance: float = 4.0  # 1 draws without the pass for no caption
    solver: str | None = None  # of solvers.SOLVERS; None is the model's own choice, DDIM where steps are shared
    negative_prompt: str | None = None  # None leads away from what the model takes for no caption
    width_px: int | None = None  # None is the model's own
    height_px: int | None = None
    lora: str | None = None  # one that was loaded with the model


class CancelledDrawing(EmuRayError):
    """Nobody waits for the picture any more."""


class EngineClosedError(EmuRayError):
    """The engine was closed, since its model left the memory: ask for the model again."""


@dataclass(frozen=True)
class Progress:
    """After a step: how many of how many are done, and, where it was asked for, what the picture looks like now, (H, W, 3) uint8."""

    step: int
    steps: int
    preview: np.ndarray | None = None


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A drawing on its way. `result` gives (H, W, 3) uint8, or raises what went wrong."""

    drawing: Drawing
    steps: int  # of this drawing
    tell: Callable[[Progress], None]
    number: int
    submitted: float = field(default_factory=time.monotonic)
    future: Future[np.ndarray] = field(default_factory=Future)
    at: int = 0  # steps done
    is_cancelled: bool = False

    def result(self, timeout_s: float | None = None) -> np.ndarray:
        """Waits for the picture."""
        return self.future.result(timeout_s)

    def cancel(self) -> None:
        """No step is begun for it any more."""
        self.is_cancelled = True

    def told(self, progress: Progress) -> None:
        """Tells whoever listens; an error of theirs is this ticket's end, and nobody else's."""
        try:
            self.tell(progress)
        except Exception:
            self.cancel()


class Watcher:
    """Is told what an engine does, from its threads; this one keeps nothing."""

    def passed(self, rows: int, seconds: float) -> None:
        """A pass of so many rows was made, or a step of a whole pipeline's call, on average."""

    def ended(self, how: str) -> None:
        """A drawing ended: `drawn`, `cancelled` or `failed`."""


class AnyEngine(Protocol):
    """What the engines have in common."""

    def submit(
        self,
        drawing: Drawing,
        tell: Callable[[Progress], None] = ...,
        previews: int = 0,
        texts: list[TextFeatures] | None = None,
    ) -> Ticket:
        """Takes a drawing; RecipeError for one that can't be drawn, EngineClosedError after `close`."""

    def waiting_s(self) -> float:
        """Seconds of work that lie ahead."""

    def close(self, *, at_once: bool = True) -> None:
        """Ends; what is on its way is cancelled, or, not `at_once`, finished."""
