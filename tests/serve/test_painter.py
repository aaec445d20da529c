"""The painter without Ray: pictures that carry their parameters, news on the way, and no more work for a client that left."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from emu_ray.errors import RecipeError
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.loading import Placement, load_engine
from serve.args import ServeArgs
from serve.catalogue import read_catalogue
from serve.painter import OffensiveError, Painted, Painter, PaintJob

JOB = PaintJob(
    model="tuned", prompt="a ball", negative_prompt=None, seed=5, n=1, steps=3, guidance=4.0, solver="ddim", width_px=16, height_px=16,
    output_format="png", output_compression=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    engine = load_engine(checkpoint, {}, Placement())
    assert isinstance(engine, Engine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def painter(checkpoint: Path, engine: Engine) -> Painter:
    async def get(name: str) -> Engine:
        assert name == "tuned"
        return engine

    return Painter(read_catalogue(ServeArgs(checkpoint=str(checkpoint))), get)


def test_pictures_carry_what_they_were_drawn_from(painter: Painter) -> None:
    first, second = asyncio.run(painter.paint(dataclasses.replace(JOB, n=2)))
    told = json.loads(Image.open(io.BytesIO(second)).text["parameters"])  # type: ignore[attr-defined]
    assert (told["prompt"], told["seed"], told["steps"], told["model"]) == ("a ball", 6, 3, "tuned")
    assert first != second
    (jpeg,) = asyncio.run(painter.paint(dataclasses.replace(JOB, output_format="jpeg", output_compression=80)))
    assert json.loads(Image.open(io.BytesIO(jpeg)).getexif()[0x010E])["seed"] == 5


def test_news_of_each_step_and_the_partial_images_come_before_the_picture(painter: Painter) -> None:
    async def all_news() -> list[Painted]:
        return [news async for news in painter.paint_live(dataclasses.replace(JOB, steps=6, partial_images=2))]

    news = asyncio.run(all_news())
    assert news[-1].step == 6 and news[-1].encoded is not None
    assert [item.step for item in news[:-1] if item.encoded] == [2, 4]
    assert sorted(item.step for item in news) == [1, 2, 3, 4, 5, 6]


def test_a_client_that_leaves_stops_the_work_at_the_next_step(painter: Painter, engine: Engine) -> None:
    async def leave() -> None:
        steps = painter.paint_live(dataclasses.replace(JOB, steps=900))
        async for news in steps:
            if news.step >= 3:
                break
        await steps.aclose()  # type: ignore[attr-defined]
        waiting = asyncio.create_task(painter.paint(dataclasses.replace(JOB, steps=900)))
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0.5)

    asyncio.run(leave())
    assert engine._tickets.now() == []


def test_the_event_loop_stays_free_while_drawing(painter: Painter) -> None:
    async def ticks_while_drawing() -> int:
        drawing, ticks = asyncio.create_task(painter.paint(dataclasses.replace(JOB, steps=20))), 0
        while not drawing.done():
            await asyncio.sleep(0.002)
            ticks += 1
        return ticks

    assert asyncio.run(ticks_while_drawing()) > 3


def test_what_the_model_can_not_draw_is_refused(painter: Painter) -> None:
    with pytest.raises(RecipeError, match="multiples of 4"):
        asyncio.run(painter.paint(dataclasses.replace(JOB, width_px=18)))


def test_a_picture_of_a_blind_comparison_tells_nothing_of_who_drew_it(painter: Painter) -> None:
    for encoding in ("png", "jpeg", "webp"):
        blind = dataclasses.replace(JOB, is_named=False, output_format=encoding, output_compression=80)
        (picture,) = asyncio.run(painter.paint(blind))
        assert b"tuned" not in picture and b"a ball" not in picture


class _Strict:
    def __init__(self, from_the: int) -> None:
        self.left = from_the

    def check(self, image: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise OffensiveError("held back")


@pytest.mark.parametrize("from_the", [0, 1])  # the first partial image, or a later picture
def test_what_the_safety_check_holds_back_is_seen_by_nobody(painter: Painter, from_the: int) -> None:
    strict = Painter(painter._models, painter._engine, safety=_Strict(from_the))
    seen: list[Painted] = []

    async def watch() -> None:
        async for news in strict.paint_live(dataclasses.replace(JOB, steps=6, partial_images=2)):
            seen.append(news)

    with pytest.raises(OffensiveError):
        asyncio.run(watch())
    assert sum(news.encoded is not None for news in seen) == from_the
