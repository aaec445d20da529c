"""Pictures are decoded in chunks; whatever happens, each ticket is answered once."""

from __future__ import annotations

import gc
import time
import weakref

import numpy as np
import pytest
import torch

from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.stepping import decoder as decoder_module
from emu_ray.generation.stepping.decoder import PictureDecoder
from emu_ray.generation.stepping.tickets import CancelledDrawing, Drawing, Ticket, Watcher
from emu_ray.generation.stepping.turns import Turns
from tests.generation.stepping.small_device import Memory, SmallModel


def _tickets(count: int) -> list[Ticket]:
    return [
        Ticket(drawing=Drawing(prompt="a ball", seed=i), steps=1, tell=lambda progress: None, number=i)
        for i in range(count)
    ]


def _latents(decoder: PictureDecoder, value: float = 0.0) -> torch.Tensor:
    return torch.full(decoder._model.shape(Drawing(prompt="", seed=0)), value)


def _finish_all(decoder: PictureDecoder, tickets: list[Ticket]) -> None:
    """The first alone; the others when all wait."""
    with decoder._turns.decoding:
        begun = decoder._quiet
        decoder.finish(tickets[0], _latents(decoder))
        while decoder._quiet == begun:  # until it was taken
            time.sleep(0.001)
        for ticket in tickets[1:]:
            decoder.finish(ticket, _latents(decoder))


def test_a_chunk_that_does_not_fit_is_halved_and_not_tried_again(
    pipeline: EmuPipeline,
) -> None:
    memory, turns = Memory(room=8), Turns()  # two pictures
    model = SmallModel(pipeline, memory)
    decoder, tickets = PictureDecoder(model, 4, turns, Watcher()), _tickets(17)
    _finish_all(decoder, tickets)
    decoder.close()
    assert all(ticket.result(1).shape == (16, 16, 3) for ticket in tickets)
    assert model.chunks == [1, *[2] * 8]
    assert memory.refused == 1


def test_more_at_once_are_tried_again_after_a_while(pipeline: EmuPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "QUIET_CHUNKS", 3)
    memory, turns = Memory(room=8), Turns()
    model = SmallModel(pipeline, memory)
    decoder = PictureDecoder(model, 4, turns, Watcher())
    for room in (8, 100):  # what took it is gone then
        memory.room, tickets = room, _tickets(9)
        _finish_all(decoder, tickets)
        assert all(ticket.result(60).shape == (16, 16, 3) for ticket in tickets)
    decoder.close()
    assert max(model.chunks[:5]) == 2 and max(model.chunks) == 4


def test_a_picture_that_can_not_be_decoded_fails_alone(pipeline: EmuPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, model = Turns(), SmallModel(pipeline, Memory(room=100))
    decode = model.decode

    def fragile(latents: list[torch.Tensor]) -> np.ndarray:
        if any(each.max() > 8 for each in latents):
            raise ValueError("a bomb")
        return decode(latents)

    monkeypatch.setattr(model, "decode", fragile)
    decoder, tickets, bomb = PictureDecoder(model, 4, turns, Watcher()), _tickets(4), _tickets(1)[0]
    with turns.decoding:
        decoder.finish(bomb, _latents(decoder, 9.0))
        for ticket in tickets:
            decoder.finish(ticket, _latents(decoder))
    decoder.close()
    with pytest.raises(ValueError, match="a bomb"):
        bomb.result(1)
    assert all(ticket.result(1).shape == (16, 16, 3) for ticket in tickets)


def test_whoever_looks_on_keeps_nobody_from_an_answer(pipeline: EmuPipeline) -> None:
    class Broken(Watcher):
        def ended(self, how: str) -> None:
            raise ValueError("a broken counter")

    turns = Turns()
    decoder, tickets = PictureDecoder(SmallModel(pipeline, Memory(room=100)), 4, turns, Broken()), _tickets(5)
    _finish_all(decoder, tickets)
    decoder.close()
    assert all(ticket.result(1).shape == (16, 16, 3) for ticket in tickets)


def test_too_few_pictures_are_an_answer_for_all(pipeline: EmuPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, model = Turns(), SmallModel(pipeline, Memory(room=100))
    monkeypatch.setattr(model, "decode", lambda latents: np.zeros((1, 16, 16, 3), np.uint8))
    decoder, tickets = PictureDecoder(model, 4, turns, Watcher()), _tickets(4)
    _finish_all(decoder, tickets)
    decoder.close()
    assert tickets[0].result(1).shape == (16, 16, 3)
    for ticket in tickets[2:]:
        with pytest.raises(ValueError, match="zip"):
            ticket.result(1)


def test_a_cancelled_one_takes_no_memory_from_the_others(pipeline: EmuPipeline) -> None:
    turns, model = Turns(), SmallModel(pipeline, Memory(room=1))  # no picture
    decoder, (ticket,) = PictureDecoder(model, 4, turns, Watcher()), _tickets(1)
    ticket.cancel()
    decoder.finish(ticket, _latents(decoder))
    decoder.close()
    with pytest.raises(CancelledDrawing):
        ticket.result(1)
    assert model.releases == 0


def test_what_failed_holds_no_memory_while_its_answer_is_kept(
    pipeline: EmuPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def short(latents: list[torch.Tensor]) -> np.ndarray:
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    turns, model = Turns(), SmallModel(pipeline, Memory(room=100))
    monkeypatch.setattr(model, "decode", short)
    decoder, (ticket,) = PictureDecoder(model, 4, turns, Watcher()), _tickets(1)
    gc.disable()
    try:
        decoder.finish(ticket, _latents(decoder))
        decoder.close()
        assert isinstance(ticket.future.exception(1), torch.OutOfMemoryError)
        assert len(held) == 2 and all(each() is None for each in held)
    finally:
        gc.enable()
