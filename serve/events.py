"""Server-sent events of a drawing, in OpenAI's shape, and what a painter's errors mean to a client.

`image_generation.partial_image` and `image_generation.completed` are OpenAI's, with our `image` (number of n), `seed`, `step` and `steps`
beside; `image_generation.progress` is ours, sent only where it was asked for.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from emu_ray.errors import RecipeError
from serve.painter import Painted, PaintJob
from serve.schemas import ApiError, ImagesRequest

logger = logging.getLogger("ray.serve")
LOST_REPLICAS = 2  # of one request, which another replica then draws anew


class EventsResponse(StreamingResponse):
    """Events, whose caller's access is left with them, also by a client that was gone before the first."""

    def __init__(self, lines: AsyncIterator[str], entered: AbstractAsyncContextManager[None]) -> None:
        """`entered` was entered already: a refusal has a status of its own, which events have not."""
        super().__init__(lines, media_type="text/event-stream")
        self._entered = entered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._entered.__aexit__(None, None, None)


class Live:
    """One request's events."""

    def __init__(self, painter: DeploymentHandle, job: PaintJob, asked: ImagesRequest, timeout_s: float) -> None:
        self._painter, self._job, self._asked, self._timeout_s = painter, job, asked, timeout_s
        self._shown: dict[int, int] = {}  # partial images of each image

    async def lines(self) -> AsyncIterator[str]:
        """The events; after an error its own event is the last. A client that leaves ends the drawing at its next step."""
        until, losses = time.monotonic() + self._timeout_s, 0
        while True:
            news: Any = self._painter.options(stream=True).paint_live.remote(self._job)
            coming = aiter(news)
            try:
                while True:
                    item = await asyncio.wait_for(anext(coming), until - time.monotonic())
                    if event := self._event(item):
                        yield event
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                told = f"no answer after {self._timeout_s:g} s; ask for fewer images or steps"
                yield _line("error", ApiError(503, told, code="timeout").body())
                return
            except RayActorError as error:
                losses += 1
                if losses > LOST_REPLICAS:
                    yield _line("error", as_api_error(error).body())
                    return
                self._shown.clear()  # drawn again from its first step: the same seeds give the same pictures
            except Exception as error:
                yield _line("error", as_api_error(error).body())
                return
            finally:
                news.cancel()

    def _event(self, item: Painted) -> str | None:
        told: dict[str, Any] = {
            "image": item.image,
            "seed": self._job.seed + item.image,
            "step": item.step,
            "steps": item.steps,
        }
        if item.encoded is None:
            return _line("image_generation.progress", told) if self._asked.progress else None
        told |= {
            "b64_json": base64.b64encode(item.encoded).decode("ascii"),
            "created_at": int(time.time()),
            "size": f"{self._job.width_px}x{self._job.height_px}",
            "quality": self._asked.quality,
            "background": "opaque",
            "output_format": self._job.output_format,
        }
        if item.step == item.steps:
            return _line("image_generation.completed", {**told, "model": self._job.model, "usage": NOTHING_COUNTED})
        index = self._shown.get(item.image, 0)
        self._shown[item.image] = index + 1
        return _line("image_generation.partial_image", {**told, "partial_image_index": index})


# OpenAI counts tokens to bill them; the fields are there for its clients.
NOTHING_COUNTED = {
    "total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}  # fmt: skip


def _line(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error that a painter or the way to it raised; what it isn't told is in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return ApiError(429, "too many requests are waiting; try again later", code="overloaded")
    if isinstance(error, (RayActorError, DeploymentUnavailableError)):
        return ApiError(503, "the model is restarting; try again shortly", code="unavailable")
    if isinstance(error, RecipeError):
        cause = getattr(error, "cause", error)
        return ApiError(400, str(cause), code="invalid_value")
    logger.error("drawing failed", exc_info=error)
    return ApiError(500, "drawing failed; the server's log says why", code="internal_error")
