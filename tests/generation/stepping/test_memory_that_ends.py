"""A device whose memory is too little for passes, their recordings and the decoder at once, but enough for each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.stepping.decoder import PictureDecoder
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.pace import Pace
from emu_ray.generation.stepping.tickets import Drawing, Ticket, Watcher
from emu_ray.generation.stepping.turns import Turns


class _SmallDevice(SteppedModel):
    """A model on a device with so much room. A row of a pass takes 1 and leaves a recording of 1; a picture takes 3 to decode."""

    def __init__(self, pipeline: EmuPipeline, room: float) -> None:
        super().__init__(pipeline)
        self.room, self.recordings = room, 0.0
        self.taken = 0.0
        self.chunks: list[int] = []  # that were decoded
        self.releases = self.refused = 0
        self._change = threading.Lock()

    def release(self) -> None:
        self.recordings = 0.0
        self.releases += 1

    def answer(self, x: torch.Tensor, t: torch.Tensor, texts: list) -> torch.Tensor:
        self._take(len(x))
        try:
            self.recordings = min(len(x), self.recordings + 1)
            return super().answer(x, t, texts)
        finally:
            self._give(len(x))

    def decode(self, latents: list[torch.Tensor]) -> np.ndarray:
        self._take(3 * len(latents))
        try:
            self.chunks.append(len(latents))
            return super().decode(latents)
        finally:
            self._give(3 * len(latents))

    def _take(self, amount: float) -> None:
        with self._change:
            if self.taken + self.recordings + amount > self.room:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.taken += amount

    def _give(self, amount: float) -> None:
        with self._change:
            self.taken -= amount


def _engine(model: SteppedModel) -> Engine:
    engine = Engine(model)
    engine._profiled = lambda shape, text: Pace({1: 1.0, 2: 1.0, 4: 1.0})  # type: ignore[method-assign]
    return engine


@pytest.fixture
def roomy(pipeline: EmuPipeline) -> Iterator[Engine]:
    """The same pictures where memory doesn't end."""
    engine = _engine(SteppedModel(pipeline))
    yield engine
    engine.close()


def _drawn(engine: Engine, count: int = 8) -> list[np.ndarray]:
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=2 + i % 3)) for i in range(count)]
    return [ticket.result(60).astype(int) for ticket in tickets]


def test_each_picture_is_drawn_where_only_one_thing_fits_at_a_time(pipeline: EmuPipeline, roomy: Engine) -> None:
    model = _SmallDevice(pipeline, room=3)
    engine = _engine(model)
    try:
        found = _drawn(engine)
    finally:
        engine.close()
    assert model.releases > 0  # it was too little
    assert set(model.chunks) == {1}
    for one, expected in zip(found, _drawn(roomy), strict=True):
        assert np.abs(one - expected).max() <= 1


def test_a_chunk_that_does_not_fit_is_halved_and_not_tried_again(pipeline: EmuPipeline) -> None:
    model = _SmallDevice(pipeline, room=8)  # two pictures
    decoder = PictureDecoder(model, 4, Turns(), Watcher())
    shape = model.shape(Drawing(prompt="", seed=0))
    tickets = [Ticket(drawing=Drawing(prompt="a ball", seed=i), steps=1, tell=print, number=i) for i in range(16)]
    with decoder._turns.decoding:  # until all wait
        for ticket in tickets:
            decoder.finish(ticket, torch.zeros(shape))
    decoder.close()
    assert all(ticket.result(1).shape == (16, 16, 3) for ticket in tickets)
    assert max(model.chunks) == 2
    assert model.refused == 1


def test_what_never_fits_fails_alone(pipeline: EmuPipeline) -> None:
    model = _SmallDevice(pipeline, room=2.5)  # a guided pass, and no picture
    engine = _engine(model)
    try:
        lost = [engine.submit(Drawing(prompt="a ball", seed=i, steps=2)) for i in range(3)]
        for ticket in lost:
            with pytest.raises(torch.OutOfMemoryError):
                ticket.result(60)
        model.room = 20
        assert _drawn(engine, 2)[0].shape == (16, 16, 3)
    finally:
        engine.close()
