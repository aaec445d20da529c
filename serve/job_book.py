"""Drawings that nobody holds a connection for: asked for, looked at, fetched or cancelled by their id.

They live in the process that speaks HTTP, and end with it; what is finished is kept for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.desk import Desk, Order
from serve.errors import as_api_error
from serve.painter import Painted
from serve.schemas import ApiError, ImagesRequest

KEPT_S = 3600.0  # after its end
KEPT_BYTES = 256_000_000  # of pictures; the oldest go first
KEPT_JOBS = 1000
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


@dataclass(eq=False, kw_only=True)
class DrawingJob:
    """One of them."""

    order: Order
    asked: ImagesRequest
    owner: str | None  # the name of an API key
    status: Status = "queued"
    steps: list[int] = field(default_factory=list)  # done, of each image
    images: dict[int, bytes] = field(default_factory=dict)
    error: ApiError | None = None
    ended: float | None = None  # by time.monotonic
    task: asyncio.Task[None] | None = None

    @property
    def size_bytes(self) -> int:
        """Of its pictures."""
        return sum(len(image) for image in self.images.values())


class JobBook:
    """All jobs of this process."""

    def __init__(self, desk: Desk, now: Callable[[], float] = time.monotonic) -> None:
        self._desk, self._now = desk, now
        self._jobs: dict[str, DrawingJob] = {}

    def begin(self, order: Order, entered: AsyncExitStack, asked: ImagesRequest, owner: str | None) -> DrawingJob:
        """Starts drawing; `entered` holds the order's place, which the job leaves when it ends."""
        job = DrawingJob(order=order, asked=asked, owner=owner, steps=[0] * order.job.n)
        self._jobs[order.id] = job
        job.task = asyncio.ensure_future(self._draw(job, entered))
        self._tidy()
        return job

    def find(self, id: str, owner: str | None) -> DrawingJob:
        """ApiError 404 for one that isn't there, or isn't this caller's."""
        self._tidy()
        job = self._jobs.get(id)
        if job is None or job.owner != owner:
            raise ApiError(
                404,
                f"there is no job {id[:80]!r} here, or it ended long ago",
                param="id",
                code="job_not_found",
            )
        return job

    def of(self, owner: str | None) -> list[DrawingJob]:
        """A caller's jobs, newest first."""
        self._tidy()
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    async def cancel(self, job: DrawingJob) -> None:
        """Ends it at its next step; one that has ended stays as it is."""
        if job.task is not None and not job.task.done():
            job.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await job.task

    def described(self, job: DrawingJob) -> dict[str, Any]:
        """The job as JSON, without its pictures."""
        order = job.order
        images = [
            {"image": image, "seed": order.job.seed + image, "step": step, "steps": order.job.steps}
            for image, step in enumerate(job.steps)
        ]
        return {
            "id": order.id,
            "object": "image.job",
            "created": int(order.created),
            "model": order.job.model,
            "status": job.status,
            "position": self._desk.position(order) if job.status == "queued" else None,
            "images": images,
            "error": None if job.error is None else job.error.body()["error"],
        }

    async def _draw(self, job: DrawingJob, entered: AsyncExitStack) -> None:
        try:
            async with entered, aclosing(self._desk.news(job.order)) as coming:
                async for item in coming:
                    if isinstance(item, Painted):
                        job.status = "in_progress"
                        job.steps[item.image] = max(job.steps[item.image], item.step)
                        if item.encoded is not None and item.step == item.steps:
                            job.images[item.image] = item.encoded
            job.status = "completed"
        except ApiError as error:
            job.status, job.error = "failed", error
        except asyncio.CancelledError:
            job.status = "cancelled"
            raise
        except Exception as error:
            job.status, job.error = "failed", as_api_error(error)
        finally:
            job.ended = self._now()

    def _tidy(self) -> None:
        ended = sorted((job.ended, job.order.number, job) for job in self._jobs.values() if job.ended is not None)
        held, left = sum(job.size_bytes for *_, job in ended), len(ended)
        for at, _, job in ended:
            if self._now() > at + KEPT_S or (held > KEPT_BYTES and job.size_bytes) or left > KEPT_JOBS:
                held, left = held - job.size_bytes, left - 1
                del self._jobs[job.order.id]
