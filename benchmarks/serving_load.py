"""The client of benchmarks/serving.py: requests at set times whether or not the earlier ones are answered, or a set number in flight."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import aiohttp
import numpy as np

from benchmarks.serving_models import Job
from benchmarks.serving_sides import Service

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Answer:
    """Of a job: seconds since it was due, and the encoded picture, or what went wrong."""

    job: Job
    latency_s: float
    png: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class Load:
    """Answers, in the order of the jobs, and the seconds from the first job's time to the last answer."""

    answers: list[Answer]
    wall_s: float


def poisson(count: int, per_s: float) -> list[float]:
    """Seconds from the start at which requests come; the same at each call, but for the rate."""
    return [float(at) for at in np.random.default_rng(11).exponential(1 / per_s, count).cumsum()]


def open_loop(service: Service, jobs: list[Job], due_s: list[float]) -> Load:
    """Each job at its time."""

    async def run(session: aiohttp.ClientSession) -> list[Answer]:
        start = time.perf_counter()

        async def one(job: Job, due: float) -> Answer:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            return await _asked(session, service, job, start + due)

        return list(await asyncio.gather(*(one(job, due) for job, due in zip(jobs, due_s, strict=True))))

    return asyncio.run(_timed(run))


def closed_loop(service: Service, jobs: list[Job], in_flight: int) -> Load:
    """As fast as they are answered, with so many on their way."""

    async def run(session: aiohttp.ClientSession) -> list[Answer]:
        left = iter(enumerate(jobs))
        found: dict[int, Answer] = {}

        async def client() -> None:
            for number, job in left:
                found[number] = await _asked(session, service, job, time.perf_counter())

        await asyncio.gather(*(client() for _ in range(in_flight)))
        return [found[number] for number in range(len(jobs))]

    return asyncio.run(_timed(run))


async def _timed(run) -> Load:  # type: ignore[no-untyped-def]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        started = time.perf_counter()
        answers = await run(session)
        return Load(answers, time.perf_counter() - started)


async def _asked(session: aiohttp.ClientSession, service: Service, job: Job, due: float) -> Answer:
    request = service.side.request(job)
    method = "GET" if request.body is None else "POST"
    try:
        async with session.request(method, service.address + request.path, json=request.body) as response:
            answer = await response.read()
        latency_s = time.perf_counter() - due
        if response.status != 200:
            return Answer(job, latency_s, error=f"{response.status} {answer[:200]!r}")
        return Answer(job, latency_s, service.side.png(answer))
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError) as error:
        return Answer(job, time.perf_counter() - due, error=repr(error))
