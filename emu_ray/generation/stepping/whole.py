"""Any other text-to-image pipeline of diffusers, called whole: requests of the same settings share one call.

What such a pipeline does between its steps isn't known here, so nobody joins or leaves one; a call that nobody waits for any more ends at
its next step, where the pipeline calls back.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from emu_ray.errors import InputError, RecipeError, first_line
from emu_ray.generation.stepping.pace import Pace
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
NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")


class _NobodyWaitsError(Exception):
    """Ends a call of the pipeline from within."""


def load_whole(folder: Path) -> DiffusionPipeline:
    """The pipeline of a folder, with no code of it run; InputError when diffusers can't load it or it draws no pictures from prompts alone."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # diffusers, transformers and safetensors each raise their own
        raise InputError(f"can't load the pipeline of {folder}: {first_line(error)[:300]}") from error
    known = inspect.signature(pipeline.__call__).parameters
    required = [name for name, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing := [name for name in NEEDED if name not in known] or [name for name in required if name != "prompt"]:
        raise InputError(
            f"{folder}: expected a pipeline that draws from prompts alone, found a {type(pipeline).__name__}, which differs in {missing[0]!r}"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class WholeEngine:
    """Draws with one pipeline until it is closed, oldest request first."""

    def __init__(
        self, pipeline: DiffusionPipeline, *, most: int = 8, turns: Turns | None = None, watcher: Watcher | None = None
    ) -> None:
        """At most `most` pictures a call, fewer where a larger batch gains nothing."""
        self.pipeline, self.most = pipeline, most
        self._takes = set(inspect.signature(pipeline.__call__).parameters)
        self._turns, self._watcher = turns or Turns(), watcher or Watcher()
        self._numbers = itertools.count()
        self._tickets = Tickets[Ticket](self._watcher)
        self._paces: dict[tuple[int | None, int | None], Pace] = {}  # seconds of a step, by size
        self._is_alone = False  # the call that is made
        self._others_s = 0.0  # of the call that is made, in which other engines had their turns
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._thread.start()

    def submit(
        self,
        drawing: Drawing,
        tell: Callable[[Progress], None] = lambda progress: None,
        previews: int = 0,
        texts: list[TextFeatures] | None = None,
    ) -> Ticket:
        """As `Engine.submit`; a whole pipeline shows no previews, has its own solver and encodes its texts itself."""
        for name, given in (("scheduler", drawing.solver), ("LoRA", drawing.lora)):
            if given is not None:
                raise RecipeError(f"this model has its own {name}, found {given!r}: leave it out")
        if drawing.negative_prompt is not None and "negative_prompt" not in self._takes:
            raise RecipeError("this model knows no negative prompt: leave it out")
        ticket = Ticket(drawing=drawing, steps=drawing.steps, tell=tell, number=next(self._numbers))
        self._tickets.add(ticket)
        return ticket

    def waiting_s(self) -> float:
        """Seconds of work that lie ahead; 0 for sizes not drawn yet."""
        paces = [(ticket, self._paces.get(_size(ticket.drawing))) for ticket in self._tickets.now()]
        return sum((ticket.steps - ticket.at) * pace.seconds(1) for ticket, pace in paces if pace is not None)

    def close(self, *, at_once: bool = True) -> None:
        """Ends after the call that is being made, and what is left is cancelled; or, not `at_once`, when everything is drawn."""
        self._tickets.close(at_once=at_once)
        self._thread.join()

    def _run(self) -> None:
        while (waiting := self._tickets.awaited()) is not None:
            if waiting:
                try:
                    with self._turns:
                        self._call(self._chosen(waiting))
                except Exception as error:  # nobody may wait for a thread that is gone
                    logger.exception("a call failed outside of its drawings")
                    self._tickets.fail(waiting, error)

    def _chosen(self, waiting: list[Ticket]) -> list[Ticket]:
        """The oldest, and who shares its settings."""
        oldest = waiting[0].drawing
        alike = [ticket for ticket in waiting if _settings(ticket.drawing) == _settings(oldest)]
        pace = self._paces.get(_size(oldest))
        cap = 1 if pace is None else pace.cap if pace.is_tried(pace.trial) else pace.trial
        return alike[: min(cap, self.most)]

    def _call(self, tickets: list[Ticket], is_alone: bool = False) -> None:
        """`is_alone` with all of the device's memory, and without others' turns between the steps."""
        started, self._others_s, self._is_alone = time.perf_counter(), 0.0, is_alone
        try:
            with self._turns.alone() if is_alone else nullcontext():
                images = self._drawn(tickets)
        except _NobodyWaitsError:
            return  # `awaited` ends them
        except torch.OutOfMemoryError as error:
            if len(tickets) > 1:
                self._paces[_size(tickets[0].drawing)].shrink(len(tickets))
                return
            if is_alone:
                self._tickets.fail(tickets, error)
                return
            traceback.clear_frames(error.__traceback__)  # they hold what memory it had taken
            images, is_alone = None, True
        except Exception as error:
            if len(tickets) == 1:
                self._tickets.fail(tickets, error)
                return
            logger.warning("a call for %d pictures failed, each is drawn by itself: %s", len(tickets), error)
            images = None
        if images is None:
            for ticket in tickets:  # so that the innocent go on
                self._call([ticket], is_alone)
            return
        seconds, size = (time.perf_counter() - started - self._others_s) / tickets[0].steps, _size(tickets[0].drawing)
        if size in self._paces:
            self._paces[size].note(len(tickets), seconds)
        else:
            self._paces[size] = Pace({len(tickets): seconds})
        notify(self._watcher.passed, len(tickets), seconds)
        self._tickets.leave(tickets)
        for ticket, image in zip(tickets, images, strict=True):
            ticket.drawn(image, self._watcher)

    def _drawn(self, tickets: list[Ticket]) -> np.ndarray:
        drawing = tickets[0].drawing
        given: dict[str, Any] = {
            "prompt": [ticket.drawing.prompt for ticket in tickets],
            "negative_prompt": None if drawing.negative_prompt is None else [ticket.drawing.negative_prompt for ticket in tickets],
            "num_inference_steps": drawing.steps,
            "guidance_scale": drawing.guidance,
            "height": drawing.height_px,
            "width": drawing.width_px,
            "generator": [torch.Generator().manual_seed(ticket.drawing.seed) for ticket in tickets],
            "output_type": "np",
            "use_resolution_binning": False,  # the size that was asked for
            "callback_on_step_end": lambda pipeline, step, t, tensors: self._stepped(tickets, step + 1, tensors),
            "callback": lambda step, t, latents: self._stepped(tickets, step + 1, {}),  # of older pipelines
        }  # fmt: skip
        found = self.pipeline(
            **{name: value for name, value in given.items() if name in self._takes and value is not None}
        )
        if len(found.images) != len(tickets):
            raise ValueError(f"expected {len(tickets)} pictures of the pipeline, found {len(found.images)}")
        return (np.asarray(found.images) * 255 + 0.5).astype(np.uint8)

    def _stepped(self, tickets: list[Ticket], step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if all(ticket.is_cancelled for ticket in tickets):
            raise _NobodyWaitsError
        for ticket in tickets:
            ticket.at = min(step, ticket.steps - 1)  # some pipelines take a step more than they were asked for
            if not ticket.is_cancelled:
                ticket.told(Progress(ticket.at, ticket.steps))
        if not self._is_alone:
            self._others_s += self._turns.pass_on()
        return tensors


def _size(drawing: Drawing) -> tuple[int | None, int | None]:
    return drawing.width_px, drawing.height_px


def _settings(drawing: Drawing) -> tuple[Any, ...]:
    """What all pictures of one call have in common."""
    return drawing.steps, drawing.guidance, _size(drawing), drawing.negative_prompt is None
