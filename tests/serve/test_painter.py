"""The painter without Ray: one drawing at a time, and none for a client that left."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_generator

from serve.painter import GeneratorParts, Painter, PaintJob

JOB = PaintJob(
    prompt="a ball",
    negative_prompt="",
    seed=0,
    n=1,
    steps=1,
    guidance=4.0,
    width_px=8,
    height_px=8,
    output_format="png",
    output_compression=100,
)


class SlowGenerator:
    """Draws black after 50 ms and notes each call, and whether another was under way."""

    size_px = 8

    def __init__(self, checkpoint: str, *, device: str) -> None:
        self.seeds: list[int] = []
        self.alone = True
        self._drawing = threading.Lock()

    def generate(self, prompts: list[str], seeds: list[int], settings: Any, negative_prompts: Any) -> np.ndarray:
        self.alone &= self._drawing.acquire(blocking=False)
        self.seeds += seeds
        time.sleep(0.05)
        self._drawing.release()
        return np.zeros((len(prompts), settings.height_px, settings.width_px, 3), np.uint8)


@pytest.fixture
def painter(tmp_path: Path) -> Painter:
    parts = GeneratorParts(generator=SlowGenerator, settings=tiny_generator.TinySettings)
    return Painter(str(tmp_path), "cpu", parts)


def test_jobs_at_once_are_drawn_one_at_a_time_in_order(painter: Painter) -> None:
    async def all_at_once() -> None:
        await asyncio.gather(*(painter.paint(dataclasses.replace(JOB, seed=seed)) for seed in range(4)))

    asyncio.run(all_at_once())
    assert painter._generator.seeds == [0, 1, 2, 3]
    assert painter._generator.alone


def test_a_waiting_job_whose_client_left_is_never_drawn(painter: Painter) -> None:
    async def leave_while_waiting() -> None:
        first, second, third = (
            asyncio.create_task(painter.paint(dataclasses.replace(JOB, seed=seed))) for seed in range(3)
        )
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.gather(first, third)

    asyncio.run(leave_while_waiting())
    assert painter._generator.seeds == [0, 2]


def test_event_loop_stays_free_while_drawing(painter: Painter) -> None:
    async def ticks_while_drawing() -> int:
        drawing, ticks = asyncio.create_task(painter.paint(JOB)), 0
        while not drawing.done():
            await asyncio.sleep(0.002)
            ticks += 1
        return ticks

    assert asyncio.run(ticks_while_drawing()) > 3
