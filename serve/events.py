"""Server-sent events of a drawing, in OpenAI's shape.

`image_generation.partial_image` and `image_generation.completed` are OpenAI's, with our `image` (number of n), `seed`, `step` and `steps`
beside; `image_generation.queued` and `image_generation.progress` are ours, sent only where progress was asked for.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.desk import Desk, Order
from serve.errors import as_api_error
from serve.painter import Painted
from serve.schemas import ImagesRequest


class EventsResponse(StreamingResponse):
    """Events, whose request's place and access are left with them, also by a client that was gone before the first."""

    def __init__(self, lines: AsyncIterator[str], entered: AsyncExitStack, headers: dict[str, str]) -> None:
        """`entered` was entered already: a refusal has a status of its own, which events have not."""
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._entered = entered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._entered.aclose()


async def event_lines(desk: Desk, order: Order, asked: ImagesRequest) -> AsyncIterator[str]:
    """The events of one request; after an error its own event is the last."""
    shown: dict[int, tuple[int, int]] = {}  # of each image: partial images so far, and the step of the last one
    try:
        async with aclosing(desk.news(order)) as coming:
            async for item in coming:
                if isinstance(item, Painted):
                    if event := _event(item, order, asked, shown):
                        yield event
                elif asked.progress:
                    yield _line("image_generation.queued", {"id": order.id, "position": item.position})
    except Exception as error:
        yield _line("error", as_api_error(error).body())


def _event(item: Painted, order: Order, asked: ImagesRequest, shown: dict[int, tuple[int, int]]) -> str | None:
    job = order.job
    told: dict[str, Any] = {"image": item.image, "seed": job.seed + item.image, "step": item.step, "steps": item.steps}
    if item.encoded is None:
        return _line("image_generation.progress", told) if asked.progress else None
    told |= {
        "b64_json": base64.b64encode(item.encoded).decode("ascii"),
        "created_at": int(time.time()),
        "size": f"{job.width_px}x{job.height_px}",
        "quality": asked.quality,
        "background": "opaque",
        "output_format": job.output_format,
    }
    if item.step == item.steps:
        return _line("image_generation.completed", {**told, "model": job.model, "usage": NOTHING_COUNTED})
    index, last = shown.get(item.image, (0, 0))
    if item.step <= last:  # another replica began anew: each partial image is sent once
        return None
    shown[item.image] = index + 1, item.step
    return _line("image_generation.partial_image", {**told, "partial_image_index": index})


# OpenAI counts tokens to bill them; the fields are there for its clients.
NOTHING_COUNTED = {
    "total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}  # fmt: skip


def _line(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
