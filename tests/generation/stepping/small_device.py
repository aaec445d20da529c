"""A device whose memory is too little for passes, their recordings and the decoder at once, but enough for each of them."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import torch

from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.stepping.model import SteppedModel


class Memory:
    """So much of it."""

    def __init__(self, room: float) -> None:
        self.room, self.taken = room, 0.0
        self.refused = 0
        self._change = threading.Lock()

    def take(self, amount: float) -> None:
        """OutOfMemoryError where it isn't there."""
        with self._change:
            if self.taken + amount > self.room:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.taken += amount

    def give(self, amount: float) -> None:
        """Back."""
        with self._change:
            self.taken -= amount


class SmallModel(SteppedModel):
    """A row of a pass takes 1 and leaves a recording of 1, up to 2; a picture takes 3 to decode."""

    def __init__(self, pipeline: EmuPipeline, memory: Memory) -> None:
        super().__init__(pipeline)
        self.memory, self.recordings = memory, 0
        self.chunks: list[int] = []  # that were decoded
        self.releases = 0

    def release(self) -> None:
        self.memory.give(self.recordings)
        self.recordings = 0
        self.releases += 1

    def answer(self, x: torch.Tensor, t: torch.Tensor, texts: list) -> torch.Tensor:
        self.memory.take(len(x))
        try:
            out = super().answer(x, t, texts)
        finally:
            self.memory.give(len(x))
        if self.recordings < 2:
            with suppress(torch.OutOfMemoryError):  # what can't be recorded is made all the same
                self.memory.take(1)
                self.recordings += 1
        return out

    def decode(self, latents: list[torch.Tensor]) -> np.ndarray:
        self.memory.take(3 * len(latents))
        try:
            self.chunks.append(len(latents))
            return super().decode(latents)
        finally:
            self.memory.give(3 * len(latents))
