"""Requests that join and leave a batch between steps.

A thread makes passes of the U-Net, each over rows of any requests whose latents have the same shape; another one decodes what is finished.
A guided request has two rows. Between two passes whoever is finished or cancelled leaves, and who waits may join. Which rows share a pass:
where batching pays (`pace.py`), the requests that need the least time, with waiting counted in their favour; else the oldest, to its end.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from emu_ray.generation.stepping.decoder import PictureDecoder
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.pace import Pace, measured
from emu_ray.generation.stepping.solvers import SolverTable, StepNumbers
from emu_ray.generation.stepping.tickets import (
    Drawing,
    Progress,
    Ticket,
    Tickets,
    Watcher,
    notify,
)
from emu_ray.generation.stepping.turns import Turns
from emu_ray.models.text import TextFeatures

logger = logging.getLogger(__name__)
TRIAL_EVERY = 10  # passes; then one of twice as many rows, if there are as many: it loses nothing but a little of the first one's time
PATIENCE = 0.5  # seconds of work that a second of waiting makes up for
R = TypeVar("R")


@dataclass(eq=False, kw_only=True)
class _Row(Ticket):
    """A drawing with its state between two steps."""

    table: SolverTable
    shape: tuple[int, int, int]
    previews: frozenset[int]  # steps after which a preview is decoded
    numbers: Tensor | None = None  # (S, 7), of the table
    x: Tensor | None = None
    clean: Tensor | None = None
    texts: list[TextFeatures] = field(default_factory=list)  # of no caption and the caption, or the caption alone

    @property
    def rows(self) -> int:
        """In a pass."""
        return 1 if self.drawing.guidance == 1.0 else 2

    @property
    def group(self) -> tuple[object, ...]:
        """Who may share a pass."""
        return self.shape, self.drawing.lora


class _Batch:
    """Tickets that share a pass, with their state in one piece, and which rows are whose. It stays for as long as they are the same ones."""

    def __init__(self, tickets: list[_Row], device: torch.device) -> None:
        self.tickets = tickets
        self.x = torch.stack([ticket.x for ticket in tickets])  # type: ignore[misc]
        self.clean = torch.stack([ticket.clean for ticket in tickets])  # type: ignore[misc]
        self.texts = [text for ticket in tickets for text in ticket.texts]
        last = list(itertools.accumulate(ticket.rows for ticket in tickets))
        first = [end - ticket.rows for end, ticket in zip(last, tickets, strict=True)]
        whose = [i for i, ticket in enumerate(tickets) for _ in range(ticket.rows)]
        self._ticket = torch.tensor(whose, device=device)
        self._without, self._with_text = torch.tensor(first, device=device), torch.tensor(last, device=device) - 1
        scales = [ticket.drawing.guidance for ticket in tickets]
        self._guidance = torch.tensor(scales, device=device)[:, None, None, None]

    def advance(self, model: SteppedModel) -> None:
        """A step of each."""
        numbers = StepNumbers.of([ticket.numbers[ticket.at] for ticket in self.tickets])  # type: ignore[index]
        given = numbers.model_input(self.x)
        answers = model.answer(given[self._ticket], numbers.t[self._ticket], self.texts)
        without = answers[self._without]  # without guidance it is the same row as the other
        out = without + self._guidance * (answers[self._with_text] - without)
        self.x, self.clean = numbers.advance(self.x, out, self.clean)

    def hand_back(self, tickets: list[_Row]) -> None:
        """To those of these that it holds: their state, since they go on without the others."""
        for i, ticket in enumerate(self.tickets):
            if ticket in tickets:
                ticket.x, ticket.clean = self.x[i], self.clean[i]


class Engine:
    """Draws with one model until it is closed."""

    def __init__(
        self,
        model: SteppedModel,
        *,
        most_rows: int = 64,
        decode_at_once: int = 4,
        turns: Turns | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """`most_rows` bounds a pass, whatever its pace; pictures are decoded in chunks of `decode_at_once`.

        Engines of one device share its `turns`.
        """
        self.model, self.most_rows = model, most_rows
        self._turns, self._watcher = turns or Turns(), watcher or Watcher()
        self._turns.add(model.release)
        self._numbers = itertools.count()
        self._tickets = Tickets[_Row](self._watcher)  # waiting and running
        self._paces: dict[object, Pace] = {}  # of each group
        self._passes: Counter[object] = Counter()  # of each group
        self._batch: _Batch | None = None  # of the last pass
        self._last_group: tuple[object, ...] | None = None
        self._decoder = PictureDecoder(model, decode_at_once, self._turns, self._watcher)
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def submit(
        self,
        drawing: Drawing,
        tell: Callable[[Progress], None] = lambda progress: None,
        previews: int = 0,
        texts: list[TextFeatures] | None = None,
    ) -> Ticket:
        """Takes a drawing; `tell` is called from the engine's threads after each step. RecipeError for one that can't be drawn.

        `texts`, of no caption (or the negative one) and of the caption, were encoded elsewhere; without guidance only the second is used.
        """
        table, shape = self.model.table(drawing), self.model.shape(drawing)
        shown = frozenset(round(len(table) * (i + 1) / (previews + 1)) for i in range(previews)) - {0, len(table)}
        row = _Row(
            drawing=drawing, steps=len(table), tell=tell, number=next(self._numbers), table=table, shape=shape, previews=shown
        )  # fmt: skip
        row.texts = list(texts or [])[
            -row.rows :
        ]  # put on the device by the engine's thread: a copy waits for the pass that is made
        self._tickets.add(row)
        return row

    def waiting_s(self) -> float:
        """Seconds of work that lie ahead, for scaling by work instead of by requests; 0 for shapes not drawn yet."""
        return sum(self._left_s(ticket) for ticket in self._tickets.now())

    def close(self, *, at_once: bool = True) -> None:
        """Ends after the pass that is being made, and what is left is cancelled; or, not `at_once`, when everything is drawn."""
        self._tickets.close(at_once=at_once)
        self._thread.join()
        self._decoder.close()
        self._turns.remove(self.model.release)

    @torch.inference_mode()
    def _run(self) -> None:
        while (tickets := self._tickets.awaited()) is not None:
            if tickets:
                try:
                    self._pass(tickets)
                except Exception as error:  # nobody may wait for a thread that is gone
                    logger.exception("a pass failed outside of its drawings")
                    self._tickets.fail(tickets, error)

    def _pass(self, tickets: list[_Row]) -> None:
        group = self._next_group(tickets)
        here = [ticket for ticket in tickets if ticket.group == group]
        with self._turns:
            if not self._begun(here[0]):
                return
            try:
                self.model.use(here[0].drawing.lora)
                chosen = self._chosen(here)
            except Exception as error:  # not even one row of this shape can be drawn: the others go on
                self._tickets.fail(here, error)
                return
            self._step(chosen)

    def _next_group(self, tickets: list[_Row]) -> tuple[object, ...]:
        """Groups take turns."""
        groups = list(dict.fromkeys(ticket.group for ticket in tickets))
        if self._last_group in groups:
            last = groups.index(self._last_group)
            groups = groups[last + 1 :] + groups[: last + 1]
        self._last_group = groups[0]
        return groups[0]

    def _chosen(self, here: list[_Row]) -> list[_Row]:
        """Who of one shape shares the next pass."""
        pace, cap = self._cap(here[0], sum(ticket.rows for ticket in here))
        if pace.cap > max(ticket.rows for ticket in here):
            row_s = [0.0, *(pace.seconds(rows) for rows in (1, 2))]
            # who waits for a second is `now - submitted`, and `now` is the same for all
            here.sort(key=lambda ticket: (ticket.steps - ticket.at) * row_s[ticket.rows] + PATIENCE * ticket.submitted)
        chosen, rows = [here[0]], here[0].rows
        for ticket in here[1:]:
            if rows + ticket.rows <= cap:
                chosen.append(ticket)
                rows += ticket.rows
        return chosen

    def _cap(self, first: _Row, waiting: int) -> tuple[Pace, int]:
        """The pace of this shape, and the rows of its next pass, of so many that could share it."""
        if first.group not in self._paces:
            self._paces[first.group] = self._profiled(first.shape, first.texts[-1])
        pace = self._paces[first.group]
        self._passes[first.group] += 1
        trial = max(pace.trial, 2 * first.rows)  # another request, at least
        is_trial = self._passes[first.group] % TRIAL_EVERY == 0 and waiting >= trial
        return pace, min(self.most_rows, trial if is_trial else pace.cap)

    def _profiled(self, shape: tuple[int, int, int], text: TextFeatures) -> Pace:
        def run(rows: int) -> None:
            x = torch.zeros(rows, *shape, device=self.model.device, dtype=self.model.dtype)
            self.model.answer(x, torch.full((rows,), 500.0, device=self.model.device), [text] * rows)
            self.model.wait()

        return self._tried(lambda: measured(run, self.most_rows))

    def _tried(self, work: Callable[[], R]) -> R:
        """In a turn; where memory ends, once more with all of the device's."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what memory it had taken
        logger.warning("memory ended: once more, with nothing beside it")
        with self._turns.alone():
            return work()

    def _left_s(self, ticket: _Row) -> float:
        pace = self._paces.get(ticket.group)
        return 0.0 if pace is None else (ticket.steps - ticket.at) * pace.seconds(ticket.rows)

    def _step(self, tickets: list[_Row]) -> None:
        """One pass for these; an error that one of them causes is its own."""
        try:
            tickets = [ticket for ticket in tickets if self._begun(ticket)]
            if tickets:
                self._advance(tickets)
        except torch.OutOfMemoryError as error:  # a batch that failed is as it was before its step
            if len(tickets) == 1:
                self._tickets.fail(tickets, error)
                return
            self._paces[tickets[0].group].shrink(sum(ticket.rows for ticket in tickets))  # and the next pass is smaller
            return
        except Exception as error:
            if len(tickets) == 1:
                self._tickets.fail(tickets, error)
                return
        else:
            return
        for ticket in tickets:  # each by itself, so that the innocent go on
            self._step([ticket])

    def _begun(self, ticket: _Row) -> bool:
        if ticket.x is not None:
            return True
        try:
            self._tried(lambda: self._begin(ticket))
        except Exception as error:
            self._tickets.fail([ticket], error)
            return False
        return True

    def _begin(self, ticket: _Row) -> None:
        drawing = ticket.drawing
        noise = self.model.noise(drawing) * ticket.table.noise
        if ticket.texts:
            ticket.texts = [self.model.as_told(text) for text in ticket.texts]
        else:
            captions = [drawing.negative_prompt, drawing.prompt][-ticket.rows :]
            ticket.texts = [self.model.text(caption) for caption in captions]
        ticket.numbers = ticket.table.numbers(self.model.device)
        ticket.clean, ticket.x = torch.zeros_like(noise), noise

    def _advance(self, tickets: list[_Row]) -> None:
        if len(tickets) == 1:
            batch, seconds = self._tried(lambda: self._passed(tickets))
        else:
            batch, seconds = self._passed(tickets)
        for ticket in tickets:
            ticket.at += 1
        if self.model.is_settled:
            self._paces[tickets[0].group].note(len(batch.texts), seconds)
        notify(self._watcher.passed, len(batch.texts), seconds)
        batch.hand_back([ticket for ticket in tickets if ticket.at == ticket.steps or ticket.at in ticket.previews])
        for ticket in tickets:
            self._told(ticket)

    def _passed(self, tickets: list[_Row]) -> tuple[_Batch, float]:
        """Their batch after a pass, and the seconds that this took."""
        started = time.perf_counter()
        batch = self._batched(tickets)
        batch.advance(self.model)
        self.model.wait()
        return batch, time.perf_counter() - started

    def _batched(self, tickets: list[_Row]) -> _Batch:
        if self._batch is None or self._batch.tickets != tickets:
            if self._batch is not None:
                self._batch.hand_back(self._batch.tickets)
            self._batch = _Batch(tickets, self.model.device)
        return self._batch

    def _told(self, ticket: _Row) -> None:
        if ticket.at == ticket.steps:
            self._decoder.finish(ticket, ticket.x)  # type: ignore[arg-type]
            self._tickets.leave([ticket])
        elif ticket.at in ticket.previews and ticket.clean is not None:
            self._decoder.preview(ticket, ticket.at, ticket.clean)
        else:
            ticket.told(Progress(ticket.at, ticket.steps))
