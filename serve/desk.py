"""All requests that are on their way: how many are before one, what it says while it is drawn, and that it is answered or refused.

There is one process that speaks HTTP, so that what it counts is all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from serve.args import ServeArgs
from serve.catalogue import ServedModel
from serve.errors import as_api_error
from serve.metrics import DeskMetrics
from serve.painter import Painted, PaintJob
from serve.schemas import ApiError

LOST_REPLICAS = 2  # of one request, which another replica then draws anew
LOOK_EVERY_S = 0.5  # at how many are before a request that isn't begun
BUSY_AFTER_S = 2.0
TELL_EVERY_S = 5.0
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
    told: int = 0  # its last place in the queue

    @property
    def left_s(self) -> float:
        """Until it is answered or given up."""
        return self.until - time.monotonic()


@dataclass(frozen=True)
class Queued:
    """News of a request that isn't begun: so many older ones of its model aren't finished."""

    position: int


class Desk:
    """Takes requests, passes them to the deployment that draws, and knows which are not finished."""

    def __init__(self, painter: DeploymentHandle, models: dict[str, ServedModel], args: ServeArgs) -> None:
        """Beyond what all replicas work on at once requests wait here: Ray's router would ask the full replicas again and again."""
        self._painter, self._most, self._timeout_s = painter, args.most_requests, args.timeout_s
        self._slots = asyncio.Semaphore(args.max_together * args.max_replicas)
        self._application = ray_serve.get_replica_context().app_name
        self._is_cold_refused = args.min_replicas == 0 and args.cold_start == "refuse"
        wholes = {name: model.whole for name, model in models.items()}
        self._wholes = wholes if args.models_each and args.models_each < len(set(wholes.values())) else {}
        self._numbers = itertools.count()
        self._orders: dict[int, Order] = {}
        self._metrics, self._models = DeskMetrics(), list(models)
        with contextlib.suppress(RuntimeError):  # no loop runs where this is only built
            self._telling = asyncio.get_running_loop().create_task(self._tell())
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
        try:
            await asyncio.wait_for(self._slots.acquire(), order.left_s)
        except asyncio.TimeoutError:
            raise self._too_late() from None
        try:
            return await self._drawn(order)
        finally:
            self._slots.release()

    async def news(self, order: Order) -> AsyncGenerator[Painted | Queued, None]:
        """What there is to tell; ApiError for what goes wrong. Whoever closes it ends the drawing at its next step.

        A replica that died is told by nothing: another one begins anew, and the steps are counted anew.
        """
        slot = asyncio.ensure_future(self._slots.acquire())
        try:
            async with aclosing(self._patiently(slot, order)) as waiting:
                async for queued in waiting:
                    yield queued
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
        finally:
            if slot.done() and not slot.cancelled():
                self._slots.release()
            slot.cancel()

    async def states(self) -> dict[str, str] | None:
        """Of each model, by any replica; None where all are too busy to say. ApiError 503 while none runs.

        Whether one runs is asked of Ray Serve, which looks after their health: a busy one answers after its drawings.
        """
        if not await self._is_running():
            raise ApiError(503, "the models are being loaded; try again shortly", code="unavailable")
        response = self._painter.states.remote()
        try:
            return dict(await asyncio.wait_for(_answered(response), BUSY_AFTER_S))
        except asyncio.TimeoutError:
            response.cancel()
            return None
        except Exception as error:
            raise as_api_error(error) from None

    async def _drawn(self, order: Order) -> list[bytes]:
        for losses in itertools.count():
            response = self._painter_of(order).paint.remote(order.job)
            try:
                return list(await asyncio.wait_for(_answered(response), order.left_s))
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

    async def _attempt(self, order: Order) -> AsyncGenerator[Painted | Queued, None]:
        """Of one replica."""
        coming: Any = self._painter_of(order).options(stream=True).paint_live.remote(order.job)
        step = asyncio.ensure_future(_next(coming))
        try:
            while True:
                async with aclosing(self._patiently(step, order)) as waiting:
                    async for queued in waiting:
                        yield queued
                if (item := step.result()) is None:
                    return
                order.is_begun = True
                yield item
                step = asyncio.ensure_future(_next(coming))
        finally:
            coming.cancel()
            step.cancel()

    async def _patiently(self, task: asyncio.Future[Any], order: Order) -> AsyncGenerator[Queued, None]:
        """Until the task is done: how many are before an order that isn't begun, as that changes. ApiError when time is up."""
        while True:
            patience = order.left_s if order.is_begun else min(order.left_s, LOOK_EVERY_S)
            await asyncio.wait({task}, timeout=max(0.0, patience))
            if task.done():
                return
            if order.left_s <= 0:
                raise self._too_late()
            if not order.is_begun and (position := self.position(order)) not in (order.told, 0):
                order.told = position
                yield Queued(position)

    def _painter_of(self, order: Order) -> DeploymentHandle:
        """A replica that has the model in its memory, where not all have all."""
        whole = self._wholes.get(order.job.model)
        return self._painter if whole is None else self._painter.options(multiplexed_model_id=whole)

    def _too_late(self) -> ApiError:
        return ApiError(
            503,
            f"no answer after {self._timeout_s:g} s; ask for fewer images or steps, or try again later",
            code="timeout",
        )

    async def require_awake(self) -> None:
        """ApiError 503 while no replica runs, where that is the recipe's wish; a question to it then wakes one."""
        if not self._is_cold_refused or await self._is_running():
            return
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(_answered(self._painter.states.remote()))
            self._waking.add_done_callback(lambda waking: waking.cancelled() or waking.exception())
        raise ApiError(
            503, "the model is asleep and was woken; try again later", code="cold_start", retry_after_s=WAKE_S
        )

    async def _is_running(self) -> bool:
        status = (await asyncio.to_thread(ray_serve.status)).applications[self._application]
        return status.deployments[self._painter.deployment_name].replica_states.get(ReplicaState.RUNNING, 0) > 0

    async def _tell(self) -> None:
        """Ray forgets a gauge that wasn't set since it was last read."""
        while True:
            for model in self._models:
                self._counted(model)
            await asyncio.sleep(TELL_EVERY_S)

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
