"""A drawing that was asked for, on its way, and who looks on: the same for every engine."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from emu_ray.errors import EmuRayError
from emu_ray.models.text import TextFeatures

logger = logging.getLogger(__name__)


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

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # it is cancelled by `cancel` alone, and is answered then, too

    def result(self, timeout_s: float | None = None) -> np.ndarray:
        """Waits for the picture."""
        return self.future.result(timeout_s)

    def cancel(self) -> None:
        """No step is begun for it any more."""
        self.is_cancelled = True

    def told(self, progress: Progress) -> None:
        """Tells whoever listens, who must not wait for a picture; an error of theirs is this ticket's end, and nobody else's."""
        try:
            self.tell(progress)
        except Exception:
            self.cancel()

    def drawn(self, image: np.ndarray, watcher: Watcher) -> None:
        """Answers with the picture."""
        notify(watcher.ended, "drawn")
        self.future.set_result(image)

    def failed(self, error: BaseException, watcher: Watcher, how: str = "failed") -> None:
        """Answers with what went wrong, without the frames that it came through: they hold tensors, and the model."""
        notify(watcher.ended, how)
        if how == "failed" and not isinstance(error, EmuRayError):
            logger.error("a drawing failed: %s", "".join(traceback.format_exception(error)))  # a record keeps no frame
        error.__context__ = error.__cause__ = None
        self.future.set_exception(error.with_traceback(None))


class Watcher:
    """Is told what an engine does, from its threads; this one keeps nothing."""

    def passed(self, rows: int, seconds: float) -> None:
        """A pass of so many rows was made, or a step of a whole pipeline's call, on average."""

    def ended(self, how: str) -> None:
        """A drawing ended: `drawn`, `cancelled` or `failed`."""


def notify(watch: Callable[..., None], *told: object) -> None:
    """Calls a method of a watcher, whose error is nobody's end: whoever waits is to be answered."""
    try:
        watch(*told)
    except Exception:
        logger.exception("whoever looks on failed")


T = TypeVar("T", bound=Ticket)


class Tickets(Generic[T]):
    """Those of one engine that aren't finished, oldest first. Clients add, one thread of the engine's takes."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._tickets: list[T] = []
        self._is_closed = False
        self._change = threading.Condition()

    def add(self, ticket: T) -> None:
        """EngineClosedError after `close`."""
        with self._change:
            if self._is_closed:
                raise EngineClosedError("this engine was closed: no drawing is taken any more")
            self._tickets.append(ticket)
            self._change.notify_all()

    def now(self) -> list[T]:
        """All there are."""
        with self._change:
            return list(self._tickets)

    def awaited(self) -> list[T] | None:
        """Waits until there are some; the cancelled ones are ended and left out, so that there may be none. None once the engine is closed."""
        with self._change:
            while not self._tickets and not self._is_closed:
                self._change.wait()
            tickets, is_closed = list(self._tickets), self._is_closed
        if gone := [ticket for ticket in tickets if ticket.is_cancelled]:
            self.fail(gone, CancelledDrawing("the drawing was cancelled"), "cancelled")
        return None if is_closed else [ticket for ticket in tickets if not ticket.is_cancelled]

    def leave(self, gone: list[T]) -> list[T]:
        """Those of `gone` that were here, and aren't from now on; whoever drew them answers."""
        with self._change:
            before, leaving = set(self._tickets), set(gone)
            found = [ticket for ticket in gone if ticket in before]
            self._tickets = [ticket for ticket in self._tickets if ticket not in leaving]
            self._change.notify_all()
        return found

    def fail(self, gone: list[T], error: BaseException, how: str = "failed") -> None:
        """They leave with that answer, but for who left before."""
        for ticket in self.leave(gone):
            ticket.failed(error, self._watcher, how)

    def close(self, *, at_once: bool) -> None:
        """No more are taken, and those that are left are cancelled; not `at_once`, only when all have left."""
        with self._change:
            while self._tickets and not at_once:
                self._change.wait()
            self._is_closed = True
            for ticket in self._tickets:
                ticket.cancel()
            self._change.notify_all()


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
