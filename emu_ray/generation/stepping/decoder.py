"""Latents that become pictures beside the passes: a thread of its own, in chunks of one shape, oldest first."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.tickets import Progress, Ticket, Watcher
from emu_ray.generation.stepping.turns import Turns

logger = logging.getLogger(__name__)
Finished = tuple[Ticket, Tensor]  # and its latents (C, h, w)


class PictureDecoder:
    """Answers tickets whose steps are done."""

    def __init__(self, model: SteppedModel, at_once: int, turns: Turns, watcher: Watcher) -> None:
        self._model, self._at_once, self._turns, self._watcher = model, at_once, turns, watcher
        self._finished: deque[Finished] = deque()  # on their way from the steps' thread to this one's
        self._waiting: list[Finished] = []  # this one's
        self._most: dict[torch.Size, int] = {}  # more of a shape don't fit into memory
        self._thread = ThreadPoolExecutor(1, "decode")

    def finish(self, ticket: Ticket, latents: Tensor) -> None:
        """Its picture will be its answer."""
        self._finished.append((ticket, latents))
        self._thread.submit(self._decode)

    def preview(self, ticket: Ticket, step: int, latents: Tensor) -> None:
        """Its watcher will be told that step, with a picture if it can be."""
        self._thread.submit(self._preview, ticket, step, latents)

    def close(self) -> None:
        """When everything is decoded."""
        self._thread.shutdown()

    def _preview(self, ticket: Ticket, step: int, latents: Tensor) -> None:
        if ticket.is_cancelled or ticket.future.done():  # it may have been finished meanwhile, in another one's chunk
            return
        try:
            with self._turns.decoding:
                shown = self._model.decode([latents])[0]
        except Exception:  # a preview may be missing: the picture itself tells what is wrong
            logger.warning("a preview could not be decoded", exc_info=True)
            shown = None
        ticket.told(Progress(step, ticket.steps, shown))

    def _decode(self) -> None:
        while self._finished:
            self._waiting.append(self._finished.popleft())
        if not self._waiting:  # they came with an earlier chunk
            return
        shape = self._waiting[0][1].shape
        alike = [done for done in self._waiting if done[1].shape == shape]
        chunk = alike[: self._most.get(shape, self._at_once)]
        taken = {id(done) for done in chunk}
        self._waiting = [done for done in self._waiting if id(done) not in taken]
        self._decode_chunk(chunk)

    def _decode_chunk(self, chunk: list[Finished]) -> None:
        """In halves where memory ends, and at last one with all of the device's; where a picture is bad, each by itself."""
        try:
            with self._turns.decoding:
                images = self._model.decode([latents for _, latents in chunk])
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what memory it had taken
            part = len(chunk) // 2
            self._most[chunk[0][1].shape] = max(1, part)
        except Exception as error:
            if len(chunk) == 1:
                self._failed(chunk[0], error)
                return
            part = 1
        else:
            self._drawn(chunk, images)
            return
        if part == 0:
            self._decode_with_all_memory(chunk[0])
            return
        for first in range(0, len(chunk), part):
            self._decode_chunk(chunk[first : first + part])

    def _decode_with_all_memory(self, done: Finished) -> None:
        try:
            with self._turns, self._turns.decoding:  # in this order, since who has a turn may wait for the decoder
                self._model.release()
                images = self._model.decode([done[1]])
        except Exception as error:
            self._failed(done, error)
        else:
            self._drawn([done], images)

    def _drawn(self, chunk: list[Finished], images: np.ndarray) -> None:
        for (ticket, _), image in zip(chunk, images, strict=True):
            self._watcher.ended("drawn")
            ticket.future.set_result(image)

    def _failed(self, done: Finished, error: Exception) -> None:
        self._watcher.ended("failed")
        done[0].future.set_exception(error)
