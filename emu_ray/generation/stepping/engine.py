"""Requests that join and leave a batch between steps.

A thread makes passes of the U-Net, each over rows of any requests whose latents have the same shape; another one decodes what is finished.
A guided request has two rows. Between two passes whoever is finished or cancelled leaves, and who waits may join. Which rows share a pass:
where batching pays (`pace.py`), the requests that need the least time, with waiting counted in their favour; else the oldest, to its end.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from emu_ray.errors import EmuRayError
from emu_ray.generation.stepping.model import Drawing, SteppedModel
from emu_ray.generation.stepping.pace import Pace, measured
from emu_ray.generation.stepping.solvers import SolverTable, StepNumbers
from emu_ray.models.text import TextFeatures

TRIAL_EVERY = 50  # passes; then one of twice as many rows, if there are as many
PATIENCE = 0.5  # seconds of work that a second of waiting makes up for


class CancelledDrawing(EmuRayError):
    """Nobody waits for the picture any more."""


@dataclass(frozen=True)
class Progress:
    """After a step: how many of how many are done, and, where it was asked for, what the picture looks like now, (H, W, 3) uint8."""

    step: int
    steps: int
    preview: np.ndarray | None = None


@dataclass(eq=False)
class Ticket:
    """A drawing on its way. `result` gives (H, W, 3) uint8, or raises what went wrong."""

    drawing: Drawing
    table: SolverTable
    shape: tuple[int, int, int]
    previews: frozenset[int]  # steps after which a preview is decoded
    tell: Callable[[Progress], None]
    number: int
    submitted: float = field(default_factory=time.monotonic)
    future: Future[np.ndarray] = field(default_factory=Future)
    at: int = 0  # steps done
    x: Tensor | None = None
    clean: Tensor | None = None
    texts: list[TextFeatures] = field(default_factory=list)  # of no caption and the caption, or the caption alone
    is_cancelled: bool = False

    @property
    def rows(self) -> int:
        """In a pass."""
        return 1 if self.drawing.guidance == 1.0 else 2

    def result(self, timeout_s: float | None = None) -> np.ndarray:
        """Waits for the picture."""
        return self.future.result(timeout_s)

    def cancel(self) -> None:
        """No step is begun for it any more."""
        self.is_cancelled = True


class Engine:
    """Draws with one model until it is closed."""

    def __init__(self, model: SteppedModel, *, most_rows: int = 64, decode_at_once: int = 4) -> None:
        """`most_rows` bounds a pass, whatever its pace; pictures are decoded in chunks of `decode_at_once`."""
        self.model, self.most_rows, self.decode_at_once = model, most_rows, decode_at_once
        self._numbers = itertools.count()
        self._tickets: list[Ticket] = []  # waiting and running, oldest first
        self._paces: dict[tuple[int, int, int], Pace] = {}
        self._passes = 0
        self._last_shape: tuple[int, int, int] | None = None
        self._change = threading.Condition()
        self._is_closed = False
        self._finished: list[Ticket] = []
        self._decoder = ThreadPoolExecutor(1, "decode")
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def submit(
        self, drawing: Drawing, tell: Callable[[Progress], None] = lambda progress: None, previews: int = 0
    ) -> Ticket:
        """Takes a drawing; `tell` is called from the engine's threads after each step. RecipeError for one that can't be drawn."""
        table, shape = self.model.table(drawing), self.model.shape(drawing)
        shown = frozenset(round(len(table) * (i + 1) / (previews + 1)) for i in range(previews)) - {0, len(table)}
        ticket = Ticket(drawing, table, shape, shown, tell, next(self._numbers))
        with self._change:
            if self._is_closed:
                raise EmuRayError("this engine was closed: no drawing is taken any more")
            self._tickets.append(ticket)
            self._change.notify()
        return ticket

    def waiting_s(self) -> float:
        """Seconds of work that lie ahead, for scaling by work instead of by requests; 0 for shapes not drawn yet."""
        with self._change:
            tickets = list(self._tickets)
        return sum(self._left_s(ticket) for ticket in tickets)

    def place(self, ticket: Ticket) -> int:
        """How many older drawings haven't begun; 0 once it runs."""
        with self._change:
            return 0 if ticket.at else sum(t.number < ticket.number and not t.at for t in self._tickets)

    def close(self) -> None:
        """Ends after the pass that is being made; what is left is cancelled."""
        with self._change:
            self._is_closed = True
            self._change.notify()
        self._thread.join()
        self._decoder.shutdown()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._tickets and not self._is_closed:
                    self._change.wait()
                self._leave([t for t in self._tickets if t.is_cancelled or self._is_closed])
                if self._is_closed:
                    return
                tickets = list(self._tickets)
            if tickets:
                self._pass(tickets)

    def _pass(self, tickets: list[Ticket]) -> None:
        shape = self._next_shape(tickets)
        here = [ticket for ticket in tickets if ticket.shape == shape]
        try:
            chosen = self._chosen(here)
        except Exception as error:  # not even one row of this shape can be drawn: the others go on
            for ticket in here:
                self._fail(ticket, error)
            return
        self._step(chosen)

    def _leave(self, gone: list[Ticket]) -> None:
        for ticket in gone:
            self._tickets.remove(ticket)
            ticket.future.set_exception(CancelledDrawing("the drawing was cancelled"))

    def _next_shape(self, tickets: list[Ticket]) -> tuple[int, int, int]:
        """Shapes take turns."""
        shapes = list(dict.fromkeys(ticket.shape for ticket in tickets))
        if self._last_shape in shapes:
            shapes = shapes[shapes.index(self._last_shape) + 1 :] + shapes[: shapes.index(self._last_shape) + 1]
        self._last_shape = shapes[0]
        return shapes[0]

    def _chosen(self, here: list[Ticket]) -> list[Ticket]:
        """Who of one shape shares the next pass."""
        cap = self._cap(here[0].shape, sum(ticket.rows for ticket in here))
        if cap > max(ticket.rows for ticket in here):
            now = time.monotonic()
            here.sort(key=lambda ticket: self._left_s(ticket) - PATIENCE * (now - ticket.submitted))
        chosen, rows = [here[0]], here[0].rows
        for ticket in here[1:]:
            if rows + ticket.rows <= cap:
                chosen.append(ticket)
                rows += ticket.rows
        return chosen

    def _cap(self, shape: tuple[int, int, int], waiting: int) -> int:
        """Rows of the next pass, of so many that could share it."""
        if shape not in self._paces:
            self._paces[shape] = self._profiled(shape)
        pace = self._paces[shape]
        self._passes += 1
        is_trial = self._passes % TRIAL_EVERY == 0 and waiting >= pace.trial
        return min(self.most_rows, pace.trial if is_trial else pace.cap)

    def _profiled(self, shape: tuple[int, int, int]) -> Pace:
        text = self.model.text(None)

        def run(rows: int) -> None:
            x = torch.zeros(rows, *shape, device=self.model.device, dtype=self.model.dtype)
            self.model.answer(x, torch.full((rows,), 500.0, device=self.model.device), [text] * rows)

        return measured(run, self.most_rows)

    def _left_s(self, ticket: Ticket) -> float:
        pace = self._paces.get(ticket.shape)
        return 0.0 if pace is None else (len(ticket.table) - ticket.at) * pace.seconds(ticket.rows)

    def _step(self, tickets: list[Ticket]) -> None:
        """One pass for these; an error that one of them causes is its own."""
        try:
            tickets = [ticket for ticket in tickets if self._begun(ticket)]
            if tickets:
                self._advance(tickets)
        except torch.OutOfMemoryError as error:
            if len(tickets) == 1:
                self._fail(tickets[0], error)
                return
            self._paces[tickets[0].shape].shrink(sum(ticket.rows for ticket in tickets))  # and the next pass is smaller
        except Exception as error:
            if len(tickets) == 1:
                self._fail(tickets[0], error)
                return
            for ticket in tickets:  # each by itself, so that the innocent go on
                self._step([ticket])

    def _begun(self, ticket: Ticket) -> bool:
        if ticket.x is not None:
            return True
        try:
            drawing = ticket.drawing
            noise = self.model.noise(drawing) * ticket.table.noise
            texts = [self.model.text(drawing.prompt)]
            if ticket.rows == 2:
                texts.insert(0, self.model.text(drawing.negative_prompt))
            ticket.texts, ticket.clean, ticket.x = texts, torch.zeros_like(noise), noise
        except Exception as error:
            self._fail(ticket, error)
            return False
        return True

    def _advance(self, tickets: list[Ticket]) -> None:
        started = time.perf_counter()
        numbers = StepNumbers.of([(ticket.table, ticket.at) for ticket in tickets], self.model.device)
        x = torch.stack([ticket.x for ticket in tickets])  # type: ignore[misc]
        before = torch.stack([ticket.clean for ticket in tickets])  # type: ignore[misc]
        doubled = [i for i, ticket in enumerate(tickets) for _ in range(ticket.rows)]
        given = numbers.model_input(x)[doubled]
        answers = self.model.answer(given, numbers.t[doubled], [text for ticket in tickets for text in ticket.texts])
        out = self._guided(tickets, answers)
        moved, clean = numbers.advance(x, out, before)
        self._paces[tickets[0].shape].note(len(doubled), time.perf_counter() - started)
        for i, ticket in enumerate(tickets):
            ticket.x, ticket.clean, ticket.at = moved[i], clean[i], ticket.at + 1
        for ticket in tickets:
            self._told(ticket)

    def _guided(self, tickets: list[Ticket], answers: Tensor) -> Tensor:
        """One answer a request, away from that for no caption."""
        found, row = [], 0
        for ticket in tickets:
            if ticket.rows == 2:
                without, with_text = answers[row], answers[row + 1]
                found.append(without + ticket.drawing.guidance * (with_text - without))
            else:
                found.append(answers[row])
            row += ticket.rows
        return torch.stack(found)

    def _told(self, ticket: Ticket) -> None:
        if ticket.at == len(ticket.table):
            with self._change:
                self._tickets.remove(ticket)
                self._finished.append(ticket)
            self._decoder.submit(self._decode)
        elif ticket.at in ticket.previews and ticket.clean is not None:
            self._decoder.submit(self._preview, ticket, ticket.at, ticket.clean)
        else:
            self._tell(ticket, Progress(ticket.at, len(ticket.table)))

    def _tell(self, ticket: Ticket, progress: Progress) -> None:
        """An error of whoever listens is that ticket's end, and nobody else's."""
        try:
            ticket.tell(progress)
        except Exception:
            ticket.cancel()

    def _preview(self, ticket: Ticket, step: int, clean: Tensor) -> None:
        if not ticket.is_cancelled:
            self._tell(ticket, Progress(step, len(ticket.table), self.model.decode(clean[None])[0]))

    def _decode(self) -> None:
        """A chunk of what is finished, of one shape."""
        with self._change:
            if not self._finished:
                return
            shape = self._finished[0].shape
            chunk = [ticket for ticket in self._finished if ticket.shape == shape][: self.decode_at_once]
            self._finished = [ticket for ticket in self._finished if ticket not in chunk]
        self._decode_chunk(chunk)

    def _decode_chunk(self, chunk: list[Ticket]) -> None:
        try:
            images = self.model.decode(torch.stack([ticket.x for ticket in chunk]))  # type: ignore[misc]
        except Exception as error:
            if len(chunk) == 1:
                chunk[0].future.set_exception(error)
                return
            for ticket in chunk:  # each by itself: memory may be short for all of them, or one of them bad
                self._decode_chunk([ticket])
            return
        for ticket, image in zip(chunk, images, strict=True):
            ticket.future.set_result(image)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        with self._change:
            self._tickets.remove(ticket)
        ticket.future.set_exception(error)
