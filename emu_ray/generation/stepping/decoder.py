"""Latents that become pictures beside the passes: a thread of its own, in chunks of one shape, oldest first."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.tickets import CancelledDrawing, Progress, Ticket, Watcher
from emu_ray.generation.stepping.turns import Turns

logger = logging.getLogger(__name__)
QUIET_CHUNKS = 200  # after which more at once are tried again: what took the memory may be gone


@dataclass(frozen=True, eq=False)
class _Finished:
    ticket: Ticket
    latents: Tensor  # (C, h, w)


class PictureDecoder:
    """Answers tickets whose steps are done."""

    def __init__(self, model: SteppedModel, at_once: int, turns: Turns, watcher: Watcher) -> None:
        self._model, self._at_once, self._turns, self._watcher = model, at_once, turns, watcher
        self._finished: deque[_Finished] = deque()  # on their way from the steps' thread to this one's
        self._waiting: list[_Finished] = []  # this one's
        self._most: dict[torch.Size, int] = {}  # more of a shape don't fit into memory
        self._quiet = 0  # chunks since memory ended
        self._pool = ThreadPoolExecutor(1, "decode")

    def finish(self, ticket: Ticket, latents: Tensor) -> None:
        """Decodes the picture of these latents (C, h, w), and answers the ticket with it, or with what went wrong."""
        self._finished.append(_Finished(ticket, latents))
        self._pool.submit(self._decode)

    def preview(self, ticket: Ticket, step: int, latents: Tensor) -> None:
        """Tells whoever listens to the ticket of that step, with a picture of these latents (C, h, w) if it can be decoded."""
        self._pool.submit(self._preview, ticket, step, latents)

    def close(self) -> None:
        """When everything is decoded."""
        self._pool.shutdown()

    def _preview(self, ticket: Ticket, step: int, latents: Tensor) -> None:
        if ticket.is_cancelled or ticket.future.done():  # it may have been finished meanwhile, in another one's chunk
            return
        try:
            shown = self._decoded([latents])[0]
        except Exception as error:  # a preview may be missing: the picture itself tells what is wrong
            logger.warning("a preview could not be decoded: %s", error)
            shown = None
        ticket.told(Progress(step, ticket.steps, shown))

    def _decode(self) -> None:
        while self._finished:
            self._waiting.append(self._finished.popleft())
        if not self._waiting:  # they came with an earlier chunk
            return
        shape = self._waiting[0].latents.shape
        chunk = [done for done in self._waiting if done.latents.shape == shape]
        chunk = chunk[: self._most.get(shape, self._at_once)]
        self._waiting = [done for done in self._waiting if done not in chunk]
        self._quiet += 1
        if self._quiet > QUIET_CHUNKS:
            self._most.clear()
        try:
            self._decode_chunk(chunk)
        except Exception as error:  # nobody may wait for an answer that doesn't come
            logger.exception("a chunk of pictures failed outside of its decoding")
            for done in chunk:
                if not done.ticket.future.done():
                    done.ticket.failed(error, self._watcher)

    def _decode_chunk(self, chunk: list[_Finished]) -> None:
        """In halves where memory ends, and at last one with all of the device's; where a picture is bad, each by itself."""
        try:
            images = self._decoded([done.latents for done in chunk])
        except torch.OutOfMemoryError:
            part = -(-len(chunk) // 2)
            self._most[chunk[0].latents.shape], self._quiet = part, 0
        except Exception as error:
            if len(chunk) == 1:
                chunk[0].ticket.failed(error, self._watcher)
                return
            part = 1
        else:
            self._answer(chunk, images)
            return
        if len(chunk) == 1:
            self._decode_alone(chunk[0])
            return
        for first in range(0, len(chunk), part):
            self._decode_chunk(chunk[first : first + part])

    def _decoded(self, latents: list[Tensor]) -> np.ndarray:
        with self._turns.decoding:
            try:
                return self._model.decode(latents)
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # they hold what memory it had taken
                raise

    def _decode_alone(self, done: _Finished) -> None:
        if done.ticket.is_cancelled:
            done.ticket.failed(CancelledDrawing("the drawing was cancelled"), self._watcher, "cancelled")
            return
        logger.warning("memory ended while a picture was decoded: once more, with nothing beside it")
        try:
            with self._turns, self._turns.alone():
                images = self._model.decode([done.latents])
        except Exception as error:
            done.ticket.failed(error, self._watcher)
        else:
            self._answer([done], images)

    def _answer(self, chunk: list[_Finished], images: np.ndarray) -> None:
        for done, image in zip(chunk, images, strict=True):
            done.ticket.drawn(image, self._watcher)
