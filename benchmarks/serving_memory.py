"""Memory of our HTTP service, summed over all of its processes, Ray's own among them.

python -m benchmarks.serving_memory [--quick]; the last line is JSON, in MB of resident memory:
  rss_growth_mb_2000    after 2,000 more drawings than the first 500, 16 in flight, each of another prompt
  rss_growth_mb_2000_of_ray  the same of a Ray Serve application that draws nothing: Ray's own share, which hasn't ended by then
  rss_mb_1000_jobs      while 1,000 jobs wait, which hold no connection, over that of the same service just before
  rss_mb_1000_waiting   while 1,000 requests wait, over that of the same service just before
Memory shared by processes is counted once for each; `pss_*` are the same with it counted once. --quick makes a tenth as many drawings.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil

from benchmarks.serving_bare import IN_FLIGHT
from benchmarks.serving_load import closed_loop
from benchmarks.serving_models import Job, write_models
from benchmarks.serving_sides import OURS, Service, Side, serving

NOTHING = Side("ray serve, draws nothing", "benchmarks.peers.ray_serve_nothing", None, OURS.request, OURS.png)
KINDS = ("rss", "pss")
WAITING = 1000
MB = 1e6


def main(quick: bool) -> None:
    """All of it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _allow_files(2 * WAITING + 500)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="emu_ray-bench-") as work:
        folder, counts = write_models(Path(work))["small"], ((50, 200) if quick else (500, 2000))
        with serving(NOTHING, folder) as service:
            found |= {f"{name}_of_ray": value for name, value in _growth(service, *counts).items()}
        with serving(OURS, folder) as service:
            found |= _growth(service, *counts)
            found |= asyncio.run(_waiting_jobs(service))
            found |= asyncio.run(_waiting(service))
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def _allow_files(most: int) -> None:
    """This process's limit, which the service inherits: a waiting request holds a socket on both sides."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, hard), hard))


def _mb(service: Service) -> dict[str, dict[int, float]]:
    """Kind of memory -> number of a process -> MB."""
    found: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for process in service.processes():
        with suppress(psutil.Error):
            memory = process.memory_full_info()
            for kind in KINDS:
                found[kind][process.pid] = getattr(memory, kind) / MB
    return found


def _more(now: dict[str, dict[int, float]], before: dict[str, dict[int, float]]) -> dict[str, float]:
    """By kind, of all processes; the three that grew most are printed."""
    rss = {pid: value - before["rss"].get(pid, 0.0) for pid, value in now["rss"].items()}
    most = sorted(rss, key=lambda pid: -rss[pid])[:3]
    print(f"{sum(rss.values()):+.1f} MB: " + ", ".join(f"{_title(pid)} {rss[pid]:+.1f}" for pid in most), flush=True)
    return {kind: sum(now[kind].values()) - sum(before[kind].values()) for kind in KINDS}


def _title(pid: int) -> str:
    """What Ray calls it, without the method that it runs just now; a program's name else."""
    try:
        words = psutil.Process(pid).cmdline()[0].rsplit("/", 1)[-1].split(".")
    except (psutil.Error, IndexError):
        return str(pid)
    return words[0]


def _growth(service: Service, first: int, more: int) -> dict[str, float]:
    def drawn(start: int, count: int) -> None:
        asked = [Job(f"a photo of {start + i} red metal balls", i, 2) for i in range(count)]
        answers = closed_loop(service, asked, IN_FLIGHT).answers
        if wrong := [answer.error for answer in answers if answer.error]:
            sys.exit(f"{len(wrong)} of {count} requests failed, one with {wrong[0]}")

    drawn(0, first)
    before, grown = _mb(service), dict.fromkeys(KINDS, 0.0)
    for part in range(4):
        drawn(first + part * (more // 4), more // 4)
        print(f"after {(part + 1) * (more // 4)} more ", end="")
        grown = _more(_mb(service), before)
    return {f"{kind}_growth_mb_2000": value for kind, value in grown.items()}


async def _waiting(service: Service) -> dict[str, float]:
    """Requests of 200 steps, of which a few are drawn meanwhile."""
    before = _mb(service)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        answered = [0]
        tasks = [asyncio.create_task(_asked(session, service, number, answered)) for number in range(WAITING)]
        most = await _watched(lambda: _more(_mb(service), before))
        print(f"{WAITING - answered[0]} of {WAITING} were still waiting", flush=True)
        for task in tasks:
            task.cancel()
        failed = [done for done in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(done, str)]
    if failed:
        sys.exit(f"{len(failed)} requests weren't let in, one with {failed[0]}")
    return {f"{kind}_mb_{WAITING}_waiting": value for kind, value in most.items()}


async def _waiting_jobs(service: Service) -> dict[str, float]:
    """Jobs of 200 steps, cancelled in the end."""
    before, route = _mb(service), f"{service.address}/v1/images/jobs"
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8), timeout=timeout) as session:

        async def begin(number: int) -> str:
            body = {**service.side.request(Job(f"a photo of {number} red metal balls", number, 200)).body}
            async with session.post(route, json=body) as response:
                return str((await response.json())["id"])

        async def cancel(id: str) -> None:
            async with session.delete(f"{route}/{id}") as response:
                await response.read()

        ids = await asyncio.gather(*(begin(number) for number in range(WAITING)))
        most = await _watched(lambda: _more(_mb(service), before), 5.0)
        await asyncio.gather(*(cancel(id) for id in ids))
    return {f"{kind}_mb_{WAITING}_jobs": value for kind, value in most.items()}


async def _asked(session: aiohttp.ClientSession, service: Service, number: int, answered: list[int]) -> str | None:
    request = service.side.request(Job(f"a photo of {number} red metal balls in a meadow", number, 200))
    async with session.post(service.address + request.path, json=request.body) as response:
        answer = await response.text()
        answered[0] += 1
        return None if response.status == 200 else f"{response.status} {answer[:200]}"


async def _watched(look: Callable[[], dict[str, float]], seconds: float = 12.0) -> dict[str, float]:
    """The most that was seen."""
    most: dict[str, float] = {}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(1.0)
        now = await asyncio.to_thread(look)
        most = {name: max(value, most.get(name, value)) for name, value in now.items()}
    return most


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
