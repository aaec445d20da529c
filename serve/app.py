"""The HTTP side of the tuned model, as Ray Serve deployments.

    serve run serve.app:app checkpoint=/path/to/tuned base_checkpoint=/path/to/base

`Studio` speaks HTTP (OpenAI's images API and a page for people) and needs little; each model has its own `Painter`
deployment that can grow by itself. Nothing is loaded when this file is imported.
"""

import asyncio
import base64
import secrets
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.serve.config import AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.responses import Response

from emu_ray.errors import InputError
from emu_ray.stations import Station
from emu_ray.stations.manifest import STARTED_FILE
from serve.access import Access, Key, read_keys
from serve.events import LOST_REPLICAS, EventsResponse, Live, as_api_error
from serve.painter import Painter, PaintJob
from serve.scaling import ByWork
from serve.schemas import MAX_BODY_BYTES, ApiError, ImagesRequest, parse_images_request

PAGE = Path(__file__).parent / "pages" / "index.html"
HEALTH_TIMEOUT_S = 5.0
PAGE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)

http = FastAPI(title="emu_ray", docs_url=None, redoc_url=None, openapi_url=None)


class ServeArgs(BaseModel):
    """What `serve run` and a Serve config may set. Checkpoints are `diffusers` folders: local, absolute, or `s3://`."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str  # of the tuned model
    base_checkpoint: str | None = None  # of the pretrained one, to compare
    num_cpus: float = Field(default=1.0, ge=0)  # of each replica that draws
    num_gpus: float = Field(default=0.0, ge=0)  # above 0 the model is put on the GPU
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    keys_file: str | None = None  # of `python -m jobs.api_key`; None lets everybody ask
    seconds_ahead: float = Field(default=20.0, gt=0)  # of work for each replica before another is started
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    max_together: int = Field(default=16, ge=1)  # requests that a replica works on at once, in shared passes
    max_waiting: int = Field(default=32, ge=1)  # requests that wait for one model before new ones get 429
    timeout_s: float = Field(default=300.0, gt=0)  # of one request

    def checkpoints(self) -> dict[str, str]:
        """Name of the model in the API -> its checkpoint; the first is the default. InputError for a missing one."""
        named = {"tuned": self.checkpoint}
        if self.base_checkpoint:
            named["base"] = self.base_checkpoint
        return {name: _checked(uri) for name, uri in named.items()}


def app(args: ServeArgs) -> ray_serve.Application:
    """The application that `serve run serve.app:app` and `serve deploy` build.

    InputError when a checkpoint is not a `diffusers` folder, StationHalfWrittenError when it is not finished.
    """
    if args.max_replicas < args.min_replicas:
        raise InputError(f"max_replicas ({args.max_replicas}) must be at least min_replicas ({args.min_replicas})")
    device = "cuda" if args.num_gpus > 0 else "cpu"
    painters = {}
    for name, checkpoint in args.checkpoints().items():
        deployment = ray_serve.deployment(Painter).options(  # type: ignore[attr-defined]
            name=f"painter-{name}",
            ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
            max_ongoing_requests=args.max_together,
            max_queued_requests=args.max_waiting,
            **_replicas(args),
        )
        painters[name] = deployment.bind(checkpoint, device)
    keys = None if args.keys_file is None else read_keys(args.keys_file)
    return Studio.bind(painters, args.timeout_s, args.min_replicas == 0, keys)  # type: ignore[attr-defined]


def _replicas(args: ServeArgs) -> dict[str, Any]:
    if args.min_replicas == args.max_replicas:
        return {"num_replicas": args.max_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 2.0,
            "policy": AutoscalingPolicy(policy_function=ByWork, policy_kwargs={"seconds_ahead": args.seconds_ahead}),
        }
    }


def _checked(checkpoint: str) -> str:
    """Its absolute address; InputError when it is no diffusers folder, StationHalfWrittenError when training it never ended."""
    station = Station(checkpoint if "://" in checkpoint else Path(checkpoint).expanduser())
    files = station.store.sizes()
    if STARTED_FILE in files:
        station.require()
    if "model_index.json" not in files:
        raise InputError(
            f"expected a diffusers folder with model_index.json at {station.uri}, found none; train one first"
        )
    return station.uri


@http.exception_handler(ApiError)
async def _refused(_: Request, error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "5"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


@http.exception_handler(HTTPException)
async def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), status_code=error.status_code)


async def _answered(response: Any) -> Any:
    return await response


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


def _job(asked: ImagesRequest, model: str, own_px: int) -> PaintJob:
    width_px, height_px = asked.size_px(own_px)
    return PaintJob(
        model=model,
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


def _answer(asked: ImagesRequest, model: str, job: PaintJob, images: list[bytes]) -> dict[str, Any]:
    """OpenAI's answer; `model`, `steps`, `guidance` and each image's `seed` are ours, enough to draw it again."""
    data = [
        {"b64_json": base64.b64encode(image).decode("ascii"), "seed": job.seed + i} for i, image in enumerate(images)
    ]
    return {
        "created": int(time.time()),
        "data": data,
        "model": model,
        "size": f"{job.width_px}x{job.height_px}",
        "quality": asked.quality,
        "output_format": job.output_format,
        "steps": job.steps,
        "guidance": job.guidance,
    }


# `ray_serve.ingress` copies the routes when it decorates the class: a name that they use must stand above it.
@ray_serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
@ray_serve.ingress(http)
class Studio:
    """The routes. It validates, passes a job to the model's painter and packs the answer."""

    def __init__(
        self, painters: dict[str, DeploymentHandle], timeout_s: float, may_sleep: bool, keys: list[Key] | None
    ) -> None:
        self._painters = painters
        self._timeout_s, self._may_sleep, self._access = timeout_s, may_sleep, Access(keys)
        self._default = next(iter(painters))
        self._sizes_px: dict[str, int] = {}
        self._started = int(time.time())
        self._page = PAGE.read_text(encoding="utf-8")

    @http.get("/")
    async def page(self) -> HTMLResponse:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_POLICY})

    @http.get("/healthz")
    async def healthz(self) -> JSONResponse:
        """ok while this process answers; asks no model."""
        return JSONResponse({"status": "ok", "models": list(self._painters)})

    @http.get("/readyz")
    async def readyz(self) -> JSONResponse:
        """ok when every model answers, a full queue being an answer; else the 503 of the first that doesn't. Where none need run, none is asked."""
        if not self._may_sleep:
            await asyncio.gather(*(self._alive(painter) for painter in self._painters.values()))
        return JSONResponse({"status": "ok", "models": list(self._painters)})

    @http.get("/v1/models")
    async def models(self, request: Request) -> JSONResponse:
        self._access.known(request.headers.get("authorization"))
        data = [
            {
                "id": model,
                "object": "model",
                "created": self._started,
                "owned_by": "emu_ray",
                "size_px": await self._size_px(model),
            }
            for model in self._painters
        ]
        return JSONResponse({"object": "list", "data": data})

    @http.post("/v1/images/generations")
    async def generate(self, request: Request) -> Response:
        key = self._access.known(request.headers.get("authorization"))  # before a model is woken
        asked = parse_images_request(await _limited_body(request))
        model = asked.model or self._default
        if model not in self._painters:
            known = ", ".join(self._painters)
            message = f"model: there is no model {model[:80]!r} here; this server has {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        job = _job(asked, model, await self._size_px(model))
        entered = self._access.entered(key, job.n)
        if asked.stream:
            await entered.__aenter__()
            return EventsResponse(Live(self._painters[model], job, asked, self._timeout_s).lines(), entered)
        async with entered:
            images = await self._painted(self._painters[model], job)
        return JSONResponse(_answer(asked, model, job, images))

    async def _painted(self, painter: DeploymentHandle, job: PaintJob) -> list[bytes]:
        """The images; of a replica that died meanwhile another one draws them, the same ones from the same seeds."""
        for _ in range(LOST_REPLICAS):
            try:
                return list(await self._ask(painter.paint.remote(job)))
            except ApiError as error:
                if error.code != "unavailable":
                    raise
        return list(await self._ask(painter.paint.remote(job)))

    async def _size_px(self, model: str) -> int:
        if model not in self._sizes_px:
            self._sizes_px[model] = await self._ask(self._painters[model].size_px.remote())
        return self._sizes_px[model]

    async def _alive(self, painter: DeploymentHandle) -> None:
        try:
            await self._ask(painter.size_px.remote(), HEALTH_TIMEOUT_S)
        except ApiError as error:
            if error.code != "overloaded":
                raise

    async def _ask(self, response: Any, timeout_s: float | None = None) -> Any:
        """What the painter answers; ApiError 503 when it cannot take the job now, 500 when it fails."""
        timeout_s = timeout_s or self._timeout_s
        try:
            return await asyncio.wait_for(_answered(response), timeout_s)
        except asyncio.TimeoutError:
            response.cancel()
            message = f"no answer after {timeout_s:g} s; ask for fewer images or steps, or try again later"
            raise ApiError(503, message, code="timeout") from None
        except Exception as error:
            raise as_api_error(error) from None
