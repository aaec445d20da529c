"""Engines on a device whose memory is enough for each thing alone, and not for two at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.pace import Pace
from emu_ray.generation.stepping.tickets import Drawing, Ticket
from emu_ray.generation.stepping.turns import Turns
from tests.generation.stepping.small_device import Memory, SmallModel


def _engine(model: SteppedModel, turns: Turns | None = None) -> Engine:
    engine = Engine(model, turns=turns)
    engine._profiled = lambda shape, text: Pace({1: 1.0, 2: 1.0, 4: 1.0})  # type: ignore[method-assign]
    return engine


@pytest.fixture
def expected(pipeline: EmuPipeline) -> Iterator[list[np.ndarray]]:
    """The pictures where memory doesn't end."""
    engine = _engine(SteppedModel(pipeline))
    yield _drawn(_asked(engine))
    engine.close()


def _asked(engine: Engine, count: int = 8) -> list[Ticket]:
    return [engine.submit(Drawing(prompt="a ball", seed=i, steps=2 + i % 3)) for i in range(count)]


def _drawn(tickets: list[Ticket]) -> list[np.ndarray]:
    return [ticket.result(60).astype(int) for ticket in tickets]


def _assert_alike(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1


def test_each_picture_is_drawn_where_only_one_thing_fits_at_a_time(
    pipeline: EmuPipeline, expected: list[np.ndarray]
) -> None:
    model = SmallModel(pipeline, Memory(room=3))
    engine = _engine(model)
    try:
        found = _drawn(_asked(engine))
    finally:
        engine.close()
    assert model.releases > 0  # it was too little
    assert set(model.chunks) == {1}
    _assert_alike(found, expected)


def test_engines_of_one_device_give_each_other_what_they_hold(
    pipeline: EmuPipeline, expected: list[np.ndarray]
) -> None:
    memory, turns = Memory(room=4), Turns()
    models = [SmallModel(pipeline, memory) for _ in range(2)]
    engines = [_engine(model, turns) for model in models]
    try:
        for found in [_drawn(tickets) for tickets in [_asked(engine) for engine in engines]]:
            _assert_alike(found, expected)
        engines[0].close()
        released = models[0].releases
        _assert_alike(_drawn(_asked(engines[1])), expected)
    finally:
        for engine in engines:
            engine.close()
    assert models[0].releases == released > 0  # who is closed is asked no more


def test_texts_and_profiles_are_tried_once_more_too(pipeline: EmuPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SmallModel(pipeline, Memory(room=3))
    model.decode = lambda latents: SteppedModel.decode(model, latents)  # type: ignore[method-assign]
    model.memory.take(3)
    model.recordings = 3  # of other sizes: not a row is left
    text, fails = model.text, iter([True])

    def short(caption: str | None) -> object:
        if next(fails, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return text(caption)

    def kept() -> None:  # what the text needs is released by another model
        released.append(model.recordings)
        if len(released) > 1:
            release()

    release, released = model.release, list[int]()
    monkeypatch.setattr(model, "release", kept)
    monkeypatch.setattr(model, "text", short)
    engine = Engine(model, most_rows=2)
    try:
        ticket = engine.submit(Drawing(prompt="a ball", seed=1, steps=2, guidance=1.0))
        assert ticket.result(60).shape == (16, 16, 3)
    finally:
        engine.close()
    assert released[:2] == [3, 3]  # for the text, and for the profile


def test_what_never_fits_fails_alone_and_holds_nothing(pipeline: EmuPipeline) -> None:
    model = SmallModel(pipeline, Memory(room=1.5))  # a row, and neither a guided pass nor a picture
    model.decode = lambda latents: SteppedModel.decode(model, latents)  # type: ignore[method-assign]
    engine = _engine(model)
    try:
        guided = [engine.submit(Drawing(prompt="a ball", seed=i, steps=2, guidance=4.0)) for i in range(2)]
        innocent = [engine.submit(Drawing(prompt="a ball", seed=i, steps=2, guidance=1.0)) for i in range(2)]
        for ticket in guided:
            with pytest.raises(torch.OutOfMemoryError):
                ticket.result(60)
            error = ticket.future.exception()
            assert error is not None and error.__context__ is None
        assert all(ticket.result(60).shape == (16, 16, 3) for ticket in innocent)
    finally:
        engine.close()
