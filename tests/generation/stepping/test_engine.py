"""Requests of different steps, lengths, guidance and solvers in one engine: the pictures that each alone would be, whatever the company."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from emu_ray.errors import RecipeError
from emu_ray.generation.generator import Generator, SamplingSettings, draw
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.pace import Pace, measured
from emu_ray.generation.stepping.tickets import CancelledDrawing, Drawing, Progress
from tests.generation.small_bases import sd15, sdxl
from tests.generation.stepping.drawings import mixed_drawings


@pytest.fixture
def engine(pipeline: EmuPipeline) -> Iterator[Engine]:
    """Over the smallest pipeline; a pass of eight rows is worth it, whatever this machine is busy with."""
    engine = Engine(SteppedModel(pipeline))
    engine._profiled = lambda shape, text: Pace({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})  # type: ignore[method-assign]
    yield engine
    engine.close()


def test_in_any_company_each_picture_is_what_it_is_alone(engine: Engine) -> None:
    together = [ticket.result(60) for ticket in [engine.submit(drawing) for drawing in mixed_drawings()]]
    for drawing, picture in zip(mixed_drawings(), together, strict=True):
        alone = engine.submit(drawing).result(60)
        assert np.abs(alone.astype(int) - picture).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 1


def test_ddim_draws_what_the_pipeline_draws(engine: Engine, pipeline: EmuPipeline) -> None:
    for guidance in (1.0, 5.0):
        drawing = Drawing(prompt="a ball", seed=3, steps=4, guidance=guidance, negative_prompt="")
        (expected,) = draw(pipeline, ["a ball"], [3], SamplingSettings(steps=4, guidance=guidance))
        assert np.abs(engine.submit(drawing).result(60).astype(int) - expected).max() <= 1


def test_progress_is_told_step_by_step_with_the_previews_that_were_asked_for(engine: Engine) -> None:
    told: list[Progress] = []
    engine.submit(Drawing(prompt="a ball", seed=1, steps=6), told.append, previews=2).result(60)
    assert sorted(progress.step for progress in told) == [1, 2, 3, 4, 5]
    shown = [progress.step for progress in told if progress.preview is not None]
    assert sorted(shown) == [2, 4]
    assert all(p.preview.shape == (16, 16, 3) for p in told if p.preview is not None)


def test_after_a_cancel_at_most_one_more_step_is_made(engine: Engine) -> None:
    steps: list[int] = []
    reached = threading.Event()

    def tell(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 3:
            reached.set()

    ticket = engine.submit(Drawing(prompt="a ball", seed=1, steps=900), tell)
    assert reached.wait(60)
    ticket.cancel()
    at = ticket.at
    with pytest.raises(CancelledDrawing):
        ticket.result(60)
    assert ticket.at <= at + 1
    assert engine.submit(Drawing(prompt="a ball", seed=2, steps=2)).result(60).shape == (16, 16, 3)


def test_one_that_breaks_its_batch_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = engine.model.answer

    def breaking(x: torch.Tensor, t: torch.Tensor, texts: list) -> torch.Tensor:
        if any(text is engine.model._texts.get("a bomb") for text in texts):
            raise ValueError("a bomb")
        return answer(x, t, texts)

    monkeypatch.setattr(engine.model, "answer", breaking)
    tickets = [engine.submit(Drawing(prompt=prompt, seed=1, steps=3)) for prompt in ("a ball", "a bomb", "a box")]
    with pytest.raises(ValueError, match="a bomb"):
        tickets[1].result(60)
    assert all(tickets[i].result(60).shape == (16, 16, 3) for i in (0, 2))


def test_whoever_looks_on_ends_no_drawing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._watcher, "passed", lambda rows, seconds: 1 / 0)
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=3)) for i in range(3)]
    assert all(ticket.result(60).shape == (16, 16, 3) for ticket in tickets)


def test_a_size_that_can_not_be_drawn_at_all_fails_and_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = engine.model.shape(Drawing(prompt="", seed=0, width_px=64))

    def profiled(shape: tuple[int, int, int], text: object) -> Pace:
        if shape == large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Pace({1: 1.0, 2: 1.0})

    monkeypatch.setattr(engine, "_profiled", profiled)
    lost = engine.submit(Drawing(prompt="a ball", seed=1, steps=2, width_px=64))
    with pytest.raises(torch.OutOfMemoryError):
        lost.result(60)
    assert engine.submit(Drawing(prompt="a ball", seed=1, steps=2)).result(60).shape == (16, 16, 3)


def test_pictures_that_can_not_be_decoded_together_are_decoded_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = engine.model.decode

    def short(latents: torch.Tensor) -> np.ndarray:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(engine.model, "decode", short)
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=2)) for i in range(4)]
    assert all(ticket.result(60).shape == (16, 16, 3) for ticket in tickets)


def test_out_of_memory_halves_the_batch_and_fails_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, seen = engine.model.answer, []

    def short(x: torch.Tensor, t: torch.Tensor, texts: list) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(x, t, texts)

    monkeypatch.setattr(engine.model, "answer", short)
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=3, guidance=1.0)) for i in range(8)]
    assert all(ticket.result(60).shape == (16, 16, 3) for ticket in tickets)
    assert 0 < sum(rows > 3 for rows in seen) <= 3


def test_a_short_one_does_not_wait_for_a_long_one(engine: Engine) -> None:
    long = engine.submit(Drawing(prompt="a ball", seed=1, steps=900))
    while long.at < 3:
        time.sleep(0.01)
    engine.submit(Drawing(prompt="a box", seed=2, steps=2)).result(60)
    assert long.at < 900
    long.cancel()


class _Linear(Pace):
    def note(self, rows: int, seconds: float) -> None:
        """Twice as many rows take twice as long, whatever is seen of this small network."""


def test_where_batching_gains_nothing_the_oldest_goes_first_to_its_end(engine: Engine) -> None:
    engine._profiled = lambda shape, text: _Linear({1: 1.0, 2: 2.0})  # type: ignore[method-assign]
    ended: list[int] = []
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=9 - i, guidance=1.0)) for i in range(4)]
    for i, ticket in enumerate(tickets):
        ticket.future.add_done_callback(lambda _, i=i: ended.append(i))
    for ticket in tickets:
        ticket.result(60)
    assert ended == [0, 1, 2, 3]


def test_other_sizes_take_turns(engine: Engine) -> None:
    stepped: list[int] = []
    tickets = [
        engine.submit(
            Drawing(prompt="a ball", seed=1, steps=100, width_px=width), lambda _, width=width: stepped.append(width)
        )
        for width in (16, 32)
    ]
    assert [ticket.result(60).shape for ticket in tickets] == [(16, 16, 3), (16, 32, 3)]
    together = stepped[stepped.index(32) :][:100]
    assert all(before != after for before, after in itertools.pairwise(together))


def test_what_can_not_be_drawn_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(RecipeError, match="multiples of 4, found 18 x 16"):
        engine.submit(Drawing(prompt="a ball", seed=1, width_px=18))
    with pytest.raises(RecipeError, match="steps must be 1 to 1000"):
        engine.submit(Drawing(prompt="a ball", seed=1, steps=0))


def test_the_cap_is_the_knee_and_moves_with_what_passes_take() -> None:
    assert Pace({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.5}).cap == 4
    assert Pace({1: 1.0, 2: 2.0}).cap == 1
    pace = Pace({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0})
    assert pace.cap == 8
    for _ in range(60):
        pace.note(8, 2.7)
        pace.note(4, 1.3)
    assert pace.cap == 4
    pace.shrink(4)
    assert pace.cap == 2


def test_a_slow_machine_moves_no_knee_and_a_pass_that_was_held_up_is_forgotten() -> None:
    pace = Pace({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0, 16: 3.5})
    for _ in range(40):
        pace.note(16, 10.5)
        pace.note(8, 6.0)  # three times as slow at every size
    assert pace.cap == 16 and pace.seconds(1) > 2
    pace = Pace({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0, 16: 3.5})
    for _ in range(4):
        pace.note(16, 100.0)
    assert pace.cap == 16


def test_a_knee_that_was_measured_too_low_is_found_by_trials(engine: Engine) -> None:
    engine._profiled = lambda shape, text: Pace({1: 0.001, 2: 0.002})  # type: ignore[method-assign]
    shape = engine.model.shape(Drawing(prompt="", seed=0))
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=40, guidance=1.0)) for i in range(8)]
    for ticket in tickets:
        ticket.result(120)
    pace = engine._paces[shape, None]
    assert len(pace._rows) > 2 or pace.cap > 1
    pace = Pace({1: 1.0, 2: 2.0})
    for _ in range(40):
        pace.note(2, 1.1)
    assert (pace.cap, pace.trial) == (2, 4)
    pace.note(4, 1.3)
    assert pace.cap == 4


def test_a_pace_is_measured_up_to_the_knee_or_the_end_of_memory() -> None:
    tried: list[int] = []

    def linear(rows: int) -> None:
        tried.append(rows)
        time.sleep(0.004 * rows)

    assert measured(linear, 64).cap == 1
    assert max(tried) == 4

    def short(rows: int) -> None:
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        time.sleep(0.004)

    assert measured(short, 64).cap == 4


def test_a_machine_that_is_busy_while_a_pace_is_measured_moves_no_knee() -> None:
    def held_up(rows: int) -> None:
        time.sleep(0.03 if rows == 4 else 0.004 + 0.0002 * rows)

    assert measured(held_up, 16).cap == 16


@pytest.mark.parametrize("build", [sd15, sdxl])
def test_published_bases_draw_what_their_own_pipelines_draw(build: Callable[[Path], Path], tmp_path: Path) -> None:
    generator = Generator(build(tmp_path / "base"))
    pipeline = generator.pipeline
    drawing = Drawing(prompt="a ball", seed=7, steps=5, guidance=5.0)
    engine = Engine(SteppedModel(pipeline), most_rows=4)
    try:
        found = engine.submit(drawing).result(120)
    finally:
        engine.close()
    # a base's own scheduler may not say so, and DDIM's default is to clip, which suits pixels and not latents
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    (expected,) = draw(pipeline, ["a ball"], [7], SamplingSettings(steps=5, guidance=5.0))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_closed_engine_gives_its_model_s_memory_back_at_once(pipeline: EmuPipeline) -> None:
    engine = Engine(SteppedModel(pipeline))
    engine.submit(Drawing(prompt="a ball", seed=1, steps=2)).result(60)
    engine.close()
    model = weakref.ref(engine.model)
    gc.disable()  # which may come late, and the next model is loaded now
    try:
        del engine
        assert model() is None
    finally:
        gc.enable()
