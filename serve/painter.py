"""The deployment that holds a model and draws: requests share passes of its U-Net (`emu_ray/generation/stepping`)."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from emu_ray.stations.folders import local_folder
from serve.scaling import METRIC


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
    solver: str
    width_px: int
    height_px: int
    output_format: str  # png, jpeg or webp
    output_compression: int  # 0 to 100, not for png
    partial_images: int = 0  # of each image, on the way


@dataclass(frozen=True, kw_only=True)
class Painted:
    """News of image number `image`: after a step, perhaps with what it looks like now, or, with `step` == `steps`, the picture itself."""

    image: int
    step: int
    steps: int
    encoded: bytes | None = None


class Painter:
    """One model in memory. A request whose client left is dropped before its next step."""

    def __init__(self, checkpoint: str, device: str) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)  # replicas share the cores: spinning threads of two make both many times slower
        from emu_ray.generation import Generator
        from emu_ray.generation.stepping.engine import Engine
        from emu_ray.generation.stepping.model import SteppedModel

        self._model = SteppedModel(Generator(str(local_folder(checkpoint)), device=device).pipeline)
        self._engine = Engine(self._model)

    def size_px(self) -> int:
        """The side at which the model was trained."""
        return int(self._model.size_px)

    def waiting_s(self) -> float:
        """Seconds of work that lie ahead."""
        return self._engine.waiting_s()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `serve/scaling.py`, by Ray Serve."""
        return {METRIC: self.waiting_s()}

    async def paint(self, job: PaintJob) -> list[bytes]:
        """The encoded images, in the order of their seeds."""
        found: dict[int, bytes] = {}
        async for news in self.paint_live(job):
            if news.encoded is not None and news.step == news.steps:
                found[news.image] = news.encoded
        return [found[image] for image in range(job.n)]

    async def paint_live(self, job: PaintJob) -> AsyncIterator[Painted]:
        """News of each image as it comes; RecipeError for what the model can't draw."""
        from emu_ray.generation.stepping.tickets import Drawing, Progress

        loop, news = asyncio.get_running_loop(), asyncio.Queue[Painted | BaseException]()

        def put(item: Painted | BaseException) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        def submit(image: int) -> Any:
            def tell(progress: Progress) -> None:
                shown = None if progress.preview is None else encode(progress.preview, job, image)
                put(Painted(image=image, step=progress.step, steps=progress.steps, encoded=shown))

            def done(future: Any) -> None:
                try:
                    encoded = encode(future.result(), job, image)
                    put(Painted(image=image, step=job.steps, steps=job.steps, encoded=encoded))
                except (
                    Exception
                ) as error:  # a future keeps an error of its callback to itself, and the client would wait
                    put(error)

            drawing = Drawing(
                prompt=job.prompt, negative_prompt=job.negative_prompt, seed=job.seed + image, steps=job.steps, guidance=job.guidance,
                solver=job.solver, width_px=job.width_px, height_px=job.height_px,
            )  # fmt: skip
            ticket = self._engine.submit(drawing, tell, job.partial_images)
            ticket.future.add_done_callback(done)
            return ticket

        tickets: list[Any] = []
        try:
            tickets += [submit(image) for image in range(job.n)]
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


def encode(image: NDArray[np.uint8], job: PaintJob, number: int) -> bytes:
    """The picture, (H, W, 3), as the job's format, with what it was drawn from in its metadata."""
    buffer = io.BytesIO()
    told = json.dumps({**parameters(job), "seed": job.seed + number})
    options: dict[str, Any]
    if job.output_format == "png":
        info = PngInfo()
        info.add_text("parameters", told)
        options = {"pnginfo": info}
    else:
        exif = Image.Exif()
        exif[0x010E] = told  # ImageDescription
        options = {"quality": job.output_compression, "exif": exif}
    Image.fromarray(image).save(buffer, job.output_format.upper(), **options)
    return buffer.getvalue()


def parameters(job: PaintJob) -> dict[str, Any]:
    """What draws the job's pictures again, but for each one's seed."""
    kept = ("model", "prompt", "negative_prompt", "steps", "guidance", "solver", "width_px", "height_px")
    return {name: value for name, value in asdict(job).items() if name in kept}
