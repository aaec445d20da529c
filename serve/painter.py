"""The deployment that holds a model and draws: one call at a time, in a thread of its own."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu_ray.stations.folders import local_folder


@dataclass(frozen=True, kw_only=True)
class GeneratorParts:
    """The two classes of `emu_ray.generation` that a painter needs; a test may give others of the same shape."""

    generator: type[Any]
    settings: type[Any]


@dataclass(frozen=True, kw_only=True)
class PaintJob:
    """`n` images of one prompt; image i is drawn from `seed + i`."""

    prompt: str
    negative_prompt: str
    seed: int
    n: int
    steps: int
    guidance: float
    width_px: int
    height_px: int
    output_format: str  # png, jpeg or webp
    output_compression: int  # 0 to 100, not for png


class Painter:
    """One model in memory. A Generator is not thread-safe, hence a single worker thread; the event loop stays free.

    A request that is cancelled while it waits (its client went away) is never drawn.
    """

    def __init__(self, checkpoint: str, device: str, parts: GeneratorParts | None) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)  # replicas share the cores: spinning threads of two make both many times slower
        parts = parts or _own_parts()
        self._settings = parts.settings
        self._generator = parts.generator(str(local_folder(checkpoint)), device=device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="painter")

    def size_px(self) -> int:
        """The side at which the model was trained."""
        return int(self._generator.size_px)

    async def paint(self, job: PaintJob) -> list[bytes]:
        """The encoded images, in the order of their seeds."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._paint, job)

    def _paint(self, job: PaintJob) -> list[bytes]:
        settings = self._settings(
            steps=job.steps, guidance=job.guidance, height_px=job.height_px, width_px=job.width_px
        )
        images = self._generator.generate(
            [job.prompt] * job.n,
            [job.seed + i for i in range(job.n)],
            settings,
            negative_prompts=[job.negative_prompt] * job.n if job.negative_prompt else None,
        )
        return [encode(image, job.output_format, job.output_compression) for image in images]


def encode(image: NDArray[np.uint8], output_format: str, compression: int) -> bytes:
    """The picture, (H, W, 3), as png, jpeg or webp bytes; `compression` is the quality, 0 to 100, of the last two."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": compression}
    Image.fromarray(image).save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def _own_parts() -> GeneratorParts:
    from emu_ray.generation import Generator, SamplingSettings

    return GeneratorParts(generator=Generator, settings=SamplingSettings)
