"""All requests that are on their way: how many are before one, what it says while it is drawn, and that it is answered or refused.

There is one process that speaks HTTP, so that what it counts is all there is.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from serve.errors import as_api_error
from serve.metrics import DeskMetrics
from serve.painter import Painted, PaintJob
from serve.schemas import ApiError

LOST_REPLICAS = 2  # of one request, which another replica then draws anew
LOOK_EVERY_S = 0.5  # at how many are before a request that isn't begun
AWAKE_WITHIN_S = 1.0  # else a model's replica is asleep
BUSY_AFTER_S = 2.0
WAKE_S = 30  # what a client is told to wait while one starts


@dataclass(eq=False, kw_only=True)
class Order:
    """One request."""

    job: PaintJob
    number: int
    id: str = field(default_factory=lambda: f"img-{secrets.token_hex(12)}")
    created: float = field(default_factory=time.time)
    until: float  # by time.monotonic
    is_begun: bool = False


@dataclass(frozen=True)
class Queued:
    """News of a request that isn't begun: so many older ones of its model aren't finished."""

    position: int


class Desk:
    """Takes requests, passes them to the deployment that draws, and knows which are not finished."""

    def __init__(
        self, painter: DeploymentHandle, *, most: int, timeout_s: float, may_sleep: bool, refuses_cold: bool
    ) -> None:
        """At most `most` requests on their way; `painter` may have no replica if it `may_sleep`, and then `refuses_cold` ones."""
        self._painter, self._most, self._timeout_s = painter, most, timeout_s
        self._application = ray_serve.get_replica_context().app_name
        self._is_cold_refused = may_sleep and refuses_cold
        self._numbers = itertools.count()
        self._orders: dict[int, Order] = {}
        self._metrics = DeskMetrics()
        self._waking: asyncio.Task[Any] | None = None

    @contextmanager
    def taken(self, job: PaintJob) -> Iterator[Order]:
        """The order, which is on its way until the context is left; ApiError 429 where too many are."""
        if len(self._orders) >= self._most:
            raise ApiError(429, "too many requests are waiting; try again later", code="overloaded")
        order = Order(job=job, number=next(self._numbers), until=time.monotonic() + self._timeout_s)
        self._orders[order.number] = order
        self._counted(job.model)
        try:
            yield order
        finally:
            del self._orders[order.number]
            self._counted(job.model)

    def position(self, order: Order) -> int:
        """How many older requests of its model aren't finished."""
        older = itertools.takewhile(lambda other: other.number < order.number, self._orders.values())
        return sum(other.job.model == order.job.model for other in older)

    async def images(self, order: Order) -> list[bytes]:
        """The encoded images; of a replica that died meanwhile another one draws them, the same ones from the same seeds."""
        await self._require_awake()
        for losses in itertools.count():
            response = self._painter.paint.remote(order.job)
            try:
                return list(await asyncio.wait_for(_answered(response), order.until - time.monotonic()))
            except asyncio.TimeoutError:
                response.cancel()
                raise self._too_late() from None
            except asyncio.CancelledError:  # the client left
                response.cancel()
                raise
            except RayActorError as error:
                if losses == LOST_REPLICAS:
                    raise as_api_error(error) from None
            except Exception as error:
                raise as_api_error(error) from None
        raise AssertionError

    async def news(self, order: Order) -> AsyncGenerator[Painted | Queued, None]:
        """What there is to tell; ApiError for what goes wrong. Whoever closes it ends the drawing at its next step.

        A replica that died is told by nothing: another one begins anew, and the steps are counted anew.
        """
        await self._require_awake()
        for losses in itertools.count():
            try:
                async with aclosing(self._attempt(order)) as attempt:
                    async for item in attempt:
                        yield item
                return
            except RayActorError as error:
                if losses == LOST_REPLICAS:
                    raise as_api_error(error) from None
            except Exception as error:
                raise as_api_error(error) from None

    async def states(self) -> dict[str, str] | None:
        """Of each model, by any replica; None where all are too busy to say. ApiError 503 while none runs.

        Whether one runs is asked of Ray Serve, which looks after their health: a busy one answers after its drawings.
        """
        status = (await asyncio.to_thread(ray_serve.status)).applications[self._application]
        if not status.deployments[self._painter.deployment_name].replica_states.get(ReplicaState.RUNNING, 0):
            raise ApiError(503, "the models are being loaded; try again shortly", code="unavailable")
        response = self._painter.states.remote()
        try:
            return dict(await asyncio.wait_for(_answered(response), BUSY_AFTER_S))
        except asyncio.TimeoutError:
            response.cancel()
            return None
        except Exception as error:
            raise as_api_error(error) from None

    async def _attempt(self, order: Order) -> AsyncGenerator[Painted | Queued, None]:
        """Of one replica."""
        coming: Any = self._painter.options(stream=True).paint_live.remote(order.job)
        told, step = -1, asyncio.ensure_future(_next(coming))
        try:
            while True:
                left = order.until - time.monotonic()
                patience = left if order.is_begun else min(left, LOOK_EVERY_S)
                await asyncio.wait({step}, timeout=max(0.0, patience))
                if step.done():
                    if (item := step.result()) is None:
                        return
                    order.is_begun = True
                    yield item
                    step = asyncio.ensure_future(_next(coming))
                elif left <= 0:
                    raise self._too_late()
                elif (position := self.position(order)) not in (told, 0):
                    told = position
                    yield Queued(position)
        finally:
            coming.cancel()
            step.cancel()

    def _too_late(self) -> ApiError:
        return ApiError(
            503,
            f"no answer after {self._timeout_s:g} s; ask for fewer images or steps, or try again later",
            code="timeout",
        )

    async def _require_awake(self) -> None:
        """ApiError 503 while no replica runs, where that is the recipe's wish; the question wakes one."""
        if not self._is_cold_refused:
            return
        if self._waking is None:
            self._waking = asyncio.ensure_future(_answered(self._painter.states.remote()))
        done, _ = await asyncio.wait({self._waking}, timeout=AWAKE_WITHIN_S)
        if not done:
            raise ApiError(
                503, "the model is asleep and was woken; try again later", code="cold_start", retry_after_s=WAKE_S
            )
        answered, self._waking = self._waking, None
        if isinstance(error := answered.exception(), DeploymentUnavailableError):
            raise as_api_error(error)

    def _counted(self, model: str) -> None:
        self._metrics.has(model, sum(order.job.model == model for order in self._orders.values()))


async def _answered(response: Any) -> Any:
    return await response


async def _next(coming: Any) -> Any:
    """None at the end, which a future can hold and StopAsyncIteration it can't."""
    try:
        return await anext(coming)
    except StopAsyncIteration:
        return None
