"""A request's pictures from the engine of its model (`emu_ray/generation/stepping`), encoded, with what they were drawn from in them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from emu_ray.errors import EmuRayError
from serve.catalogue import ServedModel

if TYPE_CHECKING:  # the process that speaks HTTP needs no torch
    from emu_ray.generation.stepping.tickets import AnyEngine, Progress, Ticket
    from emu_ray.models.text import TextFeatures


@dataclass(frozen=True, kw_only=True)
class PaintJob:
    """`n` images of one prompt; image i is drawn from `seed + i`."""

    model: str
    prompt: str
    negative_prompt: str | None  # None leads away from what the model takes for no caption
    seed: int
    n: int
    steps: int
    guidance: float
    solver: str | None  # None is the model's own
    width_px: int | None
    height_px: int | None  # None is the model's own
    output_format: str  # png, jpeg or webp
    output_compression: int  # 0 to 100, not for png
    partial_images: int = 0  # of each image, on the way
    is_live: bool = True  # news of each step are told
    is_named: bool = True  # the pictures tell what drew them: not in a blind comparison


@dataclass(frozen=True, kw_only=True)
class Painted:
    """News of image number `image`: after a step, perhaps with what it looks like now, or, with `step` == `steps`, the picture itself."""

    image: int
    step: int
    steps: int
    encoded: bytes | None = None


class OffensiveError(EmuRayError):
    """The safety check rates a picture as one that isn't shown."""


class Safety(Protocol):
    """Looks at pictures before anybody else does."""

    def check(self, image: NDArray[np.uint8]) -> None:
        """OffensiveError for a picture, (H, W, 3), that isn't shown."""


GetEngine = Callable[[str], Awaitable["AnyEngine"]]
Encode = Callable[[str, "str | None"], Awaitable["TextFeatures | None"]]


class Painter:
    """Draws with the models that it is given. A request whose client left is dropped before its next step."""

    def __init__(
        self,
        models: dict[str, ServedModel],
        engine: GetEngine,
        encode: Encode | None = None,
        safety: Safety | None = None,
    ) -> None:
        """`engine` gives that of a whole model, by name; `encode` a caption's features, where this process has no text encoders."""
        self._models, self._engine, self._encode, self._safety = models, engine, encode, safety

    async def paint(self, job: PaintJob) -> list[bytes]:
        """The encoded images, in the order of their seeds."""
        found: dict[int, bytes] = {}
        async for news in self.paint_live(dataclasses.replace(job, is_live=False)):
            if news.encoded is not None:
                found[news.image] = news.encoded
        return [found[image] for image in range(job.n)]

    async def paint_live(self, job: PaintJob) -> AsyncIterator[Painted]:
        """News of each image as it comes; RecipeError for what the model can't draw, OffensiveError for what isn't shown."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Painted | BaseException]()

        def put(item: Painted | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended, and whoever waited with it
                loop.call_soon_threadsafe(news.put_nowait, item)

        tickets: list[Ticket] = []
        try:
            tickets += await self._submitted(job, put)
            left = job.n
            while left:
                item = await news.get()
                if isinstance(item, BaseException):
                    raise item
                left -= item.step == item.steps
                yield item
        finally:
            for ticket in tickets:  # of those that are finished nothing is left to cancel
                ticket.cancel()

    async def _submitted(self, job: PaintJob, put: Callable[[Painted | BaseException], None]) -> list[Ticket]:
        """A ticket for each image, in the engine of the job's model, which may have left the memory meanwhile."""
        from emu_ray.generation.stepping.tickets import EngineClosedError

        model, texts = self._models[job.model], await self._texts(job)
        while True:
            engine = await self._engine(model.whole)
            tickets: list[Ticket] = []
            try:
                for image in range(job.n):
                    ticket = self._submit(engine, job, image, texts, put)
                    tickets.append(ticket)
                return tickets
            except EngineClosedError:
                for ticket in tickets:
                    ticket.cancel()

    def _submit(
        self,
        engine: AnyEngine,
        job: PaintJob,
        image: int,
        texts: list[TextFeatures] | None,
        put: Callable[[Painted | BaseException], None],
    ) -> Ticket:
        from emu_ray.generation.stepping.tickets import Drawing

        def tell(progress: Progress) -> None:
            if not job.is_live:
                return
            try:
                shown = None if progress.preview is None else self._shown(progress.preview, job, image)
            except Exception as error:  # an OffensiveError among them: what is half drawn isn't shown either
                put(error)
                return
            put(Painted(image=image, step=progress.step, steps=progress.steps, encoded=shown))

        def done(future: Future[NDArray[np.uint8]]) -> None:
            try:
                encoded = self._shown(future.result(), job, image)
                put(Painted(image=image, step=job.steps, steps=job.steps, encoded=encoded))
            except Exception as error:  # a future keeps an error of its callback to itself, and the client would wait
                put(error)

        drawing = Drawing(
            prompt=job.prompt, negative_prompt=job.negative_prompt, seed=job.seed + image, steps=job.steps, guidance=job.guidance,
            solver=job.solver, width_px=job.width_px, height_px=job.height_px, lora=job.model if self._models[job.model].lora else None,
        )  # fmt: skip
        ticket = engine.submit(drawing, tell, job.partial_images, texts)
        ticket.future.add_done_callback(done)
        return ticket

    async def _texts(self, job: PaintJob) -> list[TextFeatures] | None:
        if self._encode is None:
            return None
        whole, captions = self._models[job.model].whole, (job.negative_prompt, job.prompt)
        found = await asyncio.gather(*(self._encode(whole, caption) for caption in captions))
        return [text for text in found if text is not None] or None

    def _shown(self, image: NDArray[np.uint8], job: PaintJob, number: int) -> bytes:
        if self._safety is not None:
            self._safety.check(image)
        return encode(image, job, number)


def encode(image: NDArray[np.uint8], job: PaintJob, number: int) -> bytes:
    """The picture, (H, W, 3), as the job's format, with what it was drawn from in its metadata."""
    buffer = io.BytesIO()
    told = json.dumps({**parameters(job), "seed": job.seed + number})
    options: dict[str, Any]
    if not job.is_named:
        options = {}
    elif job.output_format == "png":
        info = PngInfo()
        info.add_text("parameters", told)
        options = {"pnginfo": info}
    else:
        exif = Image.Exif()
        exif[0x010E] = told  # ImageDescription
        options = {"exif": exif}
    if job.output_format != "png":
        options["quality"] = job.output_compression
    Image.fromarray(image).save(buffer, job.output_format.upper(), **options)
    return buffer.getvalue()


def parameters(job: PaintJob) -> dict[str, Any]:
    """What draws the job's pictures again, but for each one's seed."""
    kept = ("model", "prompt", "negative_prompt", "steps", "guidance", "solver", "width_px", "height_px")
    return {name: value for name, value in asdict(job).items() if name in kept}
