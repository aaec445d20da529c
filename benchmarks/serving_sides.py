"""The sides of benchmarks/serving.py: each a service in processes of its own, of which one is alive at a time.

python -m benchmarks.serving_sides FOLDER PORT [MAX_WAITING] is ours: `serve.deploy.deploy` on a local Ray, its defaults, but for as many waiting
requests as come. The peers stand in benchmarks/peers/. The model's process, told by its CPU time in the first drawings, is
put on the first core and everything else, the client too, on the others, so that no side draws on two cores.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from benchmarks.serving_models import Job, jobs
from emu_ray.session.ports import free_ports

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 180.0
WARM = 5000  # the first job that a service is warmed up with; no load asks for its prompt again
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}
CAN_PIN = hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1


@dataclass(frozen=True)
class Request:
    """Of HTTP; `body` None is a GET."""

    path: str
    body: dict[str, Any] | None


@dataclass(frozen=True)
class Side:
    """How a service is started and asked."""

    name: str
    module: str
    variant: str | None
    request: Callable[[Job], Request]
    png: Callable[[bytes], bytes] = lambda answer: answer
    package: str | None = None  # that not everybody has

    def command(self, folder: Path, port: int) -> list[str]:
        """Of its process."""
        variant = [self.variant] if self.variant else []
        return [sys.executable, "-m", self.module, *variant, str(folder), str(port)]


def _ours(job: Job) -> Request:
    return Request("/v1/images/generations", {"prompt": job.prompt, "seed": job.seed, "steps": job.steps})


def _json(path: str, steps: str = "steps") -> Callable[[Job], Request]:
    return lambda job: Request(path, {"prompt": job.prompt, "seed": job.seed, steps: job.steps})


def _query(job: Job) -> Request:
    return Request("/imagine?" + urlencode({"prompt": job.prompt, "seed": job.seed, "steps": job.steps}), None)


def _decoded(answer: bytes) -> bytes:
    return base64.b64decode(json.loads(answer)["data"][0]["b64_json"])


_RAY, _LIT = "benchmarks.peers.ray_serve_images", "benchmarks.peers.litserve_images"
OURS = Side("ours", "benchmarks.serving_sides", None, _ours, _decoded)
PEERS = [
    Side("ray serve example", _RAY, "example", _query),
    Side("ray serve, one by one", _RAY, "one-by-one", _query),
    Side("ray serve, @serve.batch", _RAY, "batch", _query),
    Side("litserve", _LIT, "one-by-one", _json("/predict"), package="litserve"),
    Side("litserve, batch", _LIT, "batch", _json("/predict"), package="litserve"),
    Side("like server-async", "benchmarks.peers.server_async_images", None, _json("/api/diffusers/inference", "num_inference_steps")),
]  # fmt: skip


def present(sides: list[Side]) -> list[Side]:
    """Those whose packages are here; of the others it is printed how to get them."""
    found = []
    for side in sides:
        if side.package and importlib.util.find_spec(side.package) is None:
            print(f"{side.name}: left out, {side.package} isn't installed; pip install {side.package}", flush=True)
        else:
            found.append(side)
    return found


class SideFailedError(Exception):
    """A service that doesn't answer."""


@dataclass
class Service:
    """A running side."""

    side: Side
    address: str
    root: psutil.Process
    model: psutil.Process | None = None

    def processes(self) -> list[psutil.Process]:
        """All of it, alive."""
        return [self.root, *self.root.children(recursive=True)]

    def cpu_s(self) -> dict[int, float]:
        """CPU-seconds so far by process."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found

    def draw(self, job: Job) -> bytes:
        """One picture, as its encoded bytes."""
        asked = self.side.request(job)
        data = None if asked.body is None else json.dumps(asked.body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + asked.path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return self.side.png(answer.read())


@contextmanager
def serving(side: Side, folder: Path, *more: str) -> Iterator[Service]:
    """The side over HTTP, warm, its processes on their cores; all of them are ended afterwards. SideFailedError when it doesn't answer."""
    (port,) = free_ports(1)
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*side.command(folder, port), *more], cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        service = Service(side, f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        try:
            _wait(service, process)
            _place(service)
            yield service
        except SideFailedError as error:
            log.seek(0)
            raise SideFailedError(f"{error}\n{log.read().decode(errors='replace')[-3000:]}") from None
        finally:
            _end(service, process)


def _wait(service: Service, process: subprocess.Popen[bytes]) -> None:
    until, last = time.monotonic() + START_S, "nothing was asked"
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SideFailedError(f"{service.side.name}: its process ended with {process.returncode}")
        try:
            service.draw(*jobs(1, WARM))
            return
        except (OSError, ValueError, KeyError) as error:
            last = repr(error)
            time.sleep(0.5)
    raise SideFailedError(f"{service.side.name}: no picture after {START_S:g} s ({last})")


def _place(service: Service) -> None:
    """Warms it up, and finds the process that draws."""
    before = service.cpu_s()
    for job in jobs(6, WARM):
        service.draw(job)
    after = service.cpu_s()
    busiest = max(after, key=lambda pid: after[pid] - before.get(pid, 0.0))
    service.model = psutil.Process(busiest)
    if CAN_PIN:
        first, *others = sorted(os.sched_getaffinity(0) | {0})
        for process in service.processes():
            pin(process.pid, {first} if process.pid == busiest else set(others))


def pin(pid: int, cores: set[int]) -> None:
    """All threads of a process, and those that they will start."""
    with suppress(OSError):  # it may end meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                os.sched_setaffinity(int(task.name), cores)


def _end(service: Service, process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.Error):
        ours = service.processes()
        process.terminate()
        psutil.wait_procs(ours, timeout=6)
        for one in ours:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(ours, timeout=5)
    process.wait()


def _serve_ours(folder: str, port: str, max_waiting: str = "2000") -> None:
    from benchmarks.peers import local_ray
    from serve.args import ServeArgs
    from serve.deploy import deploy

    local_ray.start()
    deploy(ServeArgs(checkpoint=folder, max_waiting=int(max_waiting)), port=int(port))
    local_ray.stay()


if __name__ == "__main__":
    _serve_ours(*sys.argv[1:])
