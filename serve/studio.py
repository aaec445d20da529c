"""The routes: OpenAI's images API with jobs and blind comparisons beside it, and a page for people. It speaks HTTP and holds no model.

No `from __future__ import annotations` here: FastAPI reads the annotations of routes.
"""

import asyncio
import base64
import contextlib
import secrets
import time
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve import page
from serve.access import Access, Key
from serve.args import ServeArgs
from serve.catalogue import ServedModel
from serve.comparisons import Comparisons
from serve.desk import Desk, Order
from serve.documented import COMPARED, DRAWN, JOB, JOBS, LIVE, MODELS, READY, VOTED, documented
from serve.errors import as_api_error
from serve.events import EventsResponse, event_lines
from serve.job_book import JobBook
from serve.painter import PaintJob
from serve.schemas import (
    MAX_BODY_BYTES,
    ApiError,
    ComparisonRequest,
    ImagesRequest,
    JobRequest,
    VoteRequest,
    parse_request,
)

http = FastAPI(title="emu_ray", docs_url=None, redoc_url=None)
http.include_router(page.router)


@http.exception_handler(ApiError)
async def _refused(_: Request, error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


@http.exception_handler(HTTPException)
async def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(
        ApiError(error.status_code, message).body(), status_code=error.status_code, headers=error.headers
    )


@http.exception_handler(Exception)
async def _broken(_: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw is in the log, by Ray Serve; the client gets OpenAI's body all the same."""
    return JSONResponse(as_api_error(error).body(), status_code=500)


async def _limited_body(request: Request) -> bytes:
    """The body, read to its end even when too large, so that the refusal reaches a client that is still sending."""
    body, received = bytearray(), 0
    async for part in request.stream():
        received += len(part)
        if received <= MAX_BODY_BYTES:
            body += part
    if received > MAX_BODY_BYTES:
        message = f"the body may have at most {MAX_BODY_BYTES // 1024} KiB, got {received // 1024}"
        raise ApiError(413, message, code="body_too_large")
    return bytes(body)


def _job(asked: ImagesRequest, model: ServedModel) -> PaintJob:
    """ApiError 400 for what this model can't draw."""
    width_px, height_px = asked.size_px(model.size_px)
    if asked.sampler_steps > model.most_steps:
        told = f"steps: {model.name} has at most {model.most_steps}, got {asked.sampler_steps}"
        raise ApiError(400, told, param="steps", code="invalid_value")
    return PaintJob(
        model=model.name,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or None,
        seed=asked.seed if asked.seed is not None else secrets.randbelow(2**31),
        n=asked.n,
        steps=asked.sampler_steps,
        guidance=asked.guidance,
        solver=asked.scheduler,
        partial_images=asked.partial_images,
        width_px=width_px,
        height_px=height_px,
        output_format=asked.output_format,
        output_compression=asked.output_compression,
    )


def _answer(asked: ImagesRequest, job: PaintJob, images: list[bytes]) -> dict[str, Any]:
    """OpenAI's answer; `model`, `steps`, `guidance` and each image's `seed` are ours, enough to draw it again."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _base64(image), "seed": job.seed + i} for i, image in enumerate(images)],
        "model": job.model,
        "size": f"{job.width_px}x{job.height_px}" if job.width_px else "auto",
        "quality": asked.quality,
        "output_format": job.output_format,
        "steps": job.steps,
        "guidance": job.guidance,
    }


def _owner(key: Key | None) -> str | None:
    return None if key is None else key.name


async def _both(*drawings: asyncio.Future[list[bytes]]) -> list[list[bytes]]:
    """What both give; when one fails the other is ended."""
    try:
        return list(await asyncio.gather(*drawings))
    finally:
        for drawing in drawings:
            drawing.cancel()


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")


# `ray_serve.ingress` copies the routes when it decorates the class: a name that they use must stand above it.
@ray_serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@ray_serve.ingress(http)
class Studio:
    """Validates, passes a job to the painters and packs the answer. There is one of it."""

    def __init__(
        self, painter: DeploymentHandle, models: dict[str, ServedModel], args: ServeArgs, keys: list[Key] | None
    ) -> None:
        self._models, self._may_sleep = models, args.min_replicas == 0
        self._desk = Desk(painter, models, args)
        self._book, self._access = JobBook(self._desk), Access(keys)
        self._comparisons = Comparisons(models, args.votes) if args.votes and len(models) > 1 else None
        self._states = dict.fromkeys(models, "not asked")
        self._started = int(time.time())

    @http.get("/healthz", **documented("Whether this process answers; asks no model.", LIVE))
    async def healthz(self) -> JSONResponse:
        return JSONResponse({"status": "ok", "models": list(self._models)})

    @http.get(
        "/readyz", **documented("Whether models answer: `degraded` while one of several can't be loaded.", READY, 503)
    )
    async def readyz(self) -> JSONResponse:
        """ApiError 503 when none does. Where no replica need run, none is asked: it would be woken."""
        if not self._may_sleep:
            self._states = await self._desk.states() or self._states
        failed = [name for name, state in self._states.items() if state.startswith("failed")]
        if len(failed) == len(self._states):
            raise ApiError(503, "no model can be loaded; the server's log says why", code="model_failed")
        states = {
            name: state.partition(":")[0] for name, state in self._states.items()
        }  # why is in the log: it names paths
        return JSONResponse({"status": "degraded" if failed else "ok", "models": states})

    @http.get("/v1/models", **documented("The models, each with its lineage and its measured win rate.", MODELS, 401))
    async def models(self, request: Request) -> JSONResponse:
        self._key(request)
        if not self._may_sleep:
            with contextlib.suppress(ApiError):  # what is known of a model doesn't hang on its replica
                self._states = await self._desk.states() or self._states
        data = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "emu_ray",
                "status": self._states[name].partition(":")[0],
                **model.card(),
            }
            for name, model in self._models.items()
        ]
        return JSONResponse({"object": "list", "data": data, "comparisons": self._comparisons is not None})

    @http.post(
        "/v1/images/generations", **documented("Draws.", DRAWN, 400, 401, 404, 413, 429, 500, 503, body=ImagesRequest)
    )
    async def generate(self, request: Request) -> Response:
        key = self._key(request)  # before a model is woken
        asked = parse_request(await _limited_body(request), ImagesRequest)
        job = _job(asked, self._model(asked.model))
        async with AsyncExitStack() as entered:
            order = await self._entered(entered, key, job)
            headers = {"X-Request-Id": order.id}
            if asked.stream:
                return EventsResponse(event_lines(self._desk, order, asked), entered.pop_all(), headers)
            images = await self._desk.images(order)
        return JSONResponse(_answer(asked, job, images), headers=headers)

    @http.post(
        "/v1/images/jobs",
        **documented("Begins to draw, and answers at once.", JOB, 400, 401, 404, 413, 429, body=JobRequest, status=202),
    )
    async def begin(self, request: Request) -> JSONResponse:
        key = self._key(request)
        asked = parse_request(await _limited_body(request), JobRequest)
        job = _job(asked, self._model(asked.model))
        async with AsyncExitStack() as entered:
            order = await self._entered(entered, key, job)
            begun = self._book.begin(order, entered.pop_all(), asked, _owner(key))
        return JSONResponse(
            self._book.described(begun), status_code=202, headers={"Location": f"/v1/images/jobs/{order.id}"}
        )

    @http.get("/v1/images/jobs", **documented("The caller's jobs, newest first, without their pictures.", JOBS, 401))
    async def jobs(self, request: Request) -> JSONResponse:
        jobs = self._book.of(_owner(self._key(request)))
        return JSONResponse({"object": "list", "data": [self._book.described(job) for job in jobs]})

    @http.get(
        "/v1/images/jobs/{id}",
        **documented("One job; a completed one's `result` is what generations answers.", JOB, 401, 404),
    )
    async def job(self, id: str, request: Request) -> JSONResponse:
        job = self._book.find(id, _owner(self._key(request)))
        described = self._book.described(job)
        if job.status == "completed":
            described["result"] = _answer(job.asked, job.order.job, [job.images[i] for i in range(job.order.job.n)])
        return JSONResponse(described)

    @http.delete(
        "/v1/images/jobs/{id}",
        **documented("Cancels a job: no further step is begun. An ended one stays as it is.", JOB, 401, 404),
    )
    async def cancel(self, id: str, request: Request) -> JSONResponse:
        job = self._book.find(id, _owner(self._key(request)))
        await self._book.cancel(job)
        return JSONResponse(self._book.described(job))

    @http.post(
        "/v1/images/comparisons",
        **documented(
            "Draws one picture by each of two models, without telling which.",
            COMPARED,
            400,
            401,
            404,
            413,
            429,
            500,
            503,
            body=ComparisonRequest,
        ),
    )
    async def compare(self, request: Request) -> JSONResponse:
        key, comparisons = self._key(request), self._compared()
        asked = parse_request(await _limited_body(request), ComparisonRequest)
        sides = comparisons.pair_of(asked.models)
        job = _job(asked, sides[0])
        async with AsyncExitStack() as entered:
            await self._desk.require_awake()
            orders = [entered.enter_context(self._desk.taken(side)) for side in comparisons.jobs(job, sides)]
            await entered.enter_async_context(self._access.entered(key, 2))
            left, right = await _both(*(asyncio.ensure_future(self._desk.images(order)) for order in orders))
        pair = comparisons.keep(job, sides, _owner(key))
        pictures = {"left": {"b64_json": _base64(left[0])}, "right": {"b64_json": _base64(right[0])}}
        return JSONResponse(
            {"id": pair.id, "object": "image.comparison", "prompt": job.prompt, "seed": job.seed, **pictures}
        )

    @http.post(
        "/v1/images/comparisons/{id}/vote",
        **documented("Says which is better, and is told who drew which.", VOTED, 400, 401, 404, 413, body=VoteRequest),
    )
    async def vote(self, id: str, request: Request) -> JSONResponse:
        key, comparisons = self._key(request), self._compared()
        said = parse_request(await _limited_body(request), VoteRequest)
        return JSONResponse(await comparisons.vote(id, said.choice, _owner(key)))

    def _key(self, request: Request) -> Key | None:
        """Whose request it is; ApiError 403 for one that a page of another origin sends, which needs no answer to do harm."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise ApiError(403, f"requests of pages from elsewhere are refused, this one comes from {origin[:80]}")
        return self._access.known(request.headers.get("authorization"))

    def _model(self, name: str | None) -> ServedModel:
        model = self._models.get(name or next(iter(self._models)))
        if model is None:
            message = f"model: there is no model {str(name)[:80]!r} here; this server has {', '.join(self._models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model

    async def _entered(self, entered: AsyncExitStack, key: Key | None, job: PaintJob) -> Order:
        """A place at the desk; refused before the key's images are counted."""
        await self._desk.require_awake()
        order = entered.enter_context(self._desk.taken(job))
        await entered.enter_async_context(self._access.entered(key, job.n))
        return order

    def _compared(self) -> Comparisons:
        if self._comparisons is None:
            told = "this server offers no comparisons: it needs two models, and a folder for votes"
            raise ApiError(404, told, code="comparisons_not_offered")
        return self._comparisons
