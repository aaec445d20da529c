"""Our HTTP service against Ray Serve's own example, LitServe and diffusers' server-async, and against a bare loop.

python -m benchmarks.serving [--quick] [--only small|large] [--peers NAME ...]; LitServe is left out where it isn't installed. The last line is JSON:
  p95_vs_best_peer_small   95th percentile of latency over the best peer's, a U-Net with which batching pays, at 0.9 of serial capacity
  p95_vs_best_peer_large   ... one with which it hardly does
  cpu_vs_bare              CPU-seconds an image of the replica's whole process at saturation, over a bare loop's, see serving_bare.py; the
                           worse of both models, `cpu_vs_bare_small` and `_large`; `engine_vs_bare_*` the engine without Ray
  throughput_vs_best_peer  images/s with 16 requests always in flight; the worse of both models, `throughput_vs_best_peer_small` and `_large`
  overhead_ms_p50          milliseconds of a request on the idle service beyond the engine's for the same picture, median; `overhead_ms_p95`
Serial capacity is that of the plain pipeline, measured at the start. Requests come at random times (Poisson), the same on all sides, each
with 10, 20, 30 or 40 steps, and are counted from when they were due. Each side has one replica and one torch thread on a core of its own;
client, proxies and Ray have the others. Every picture is held against the plain pipeline's: a peer with errors or wrong pictures in a
load is never its best. A peer that batches calls the pipeline once for each number of steps in a batch: padding to the longest would
answer with other pictures than were asked for. The table's last column says how many cores other programs took meanwhile.
A machine's speed drifts within an hour. So in full mode ours and the best peers of that table then meet in duels: serial capacity measured
anew, each side at 0.9 and at saturation, the bare loop before and after ours, the order turned round the next time. The ratios are medians of the duels' ratios.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch

from benchmarks.serving_bare import IN_FLIGHT, drawing
from benchmarks.serving_load import Load, closed_loop, open_loop, poisson
from benchmarks.serving_models import Job, Reference, jobs, reference, write_models
from benchmarks.serving_sides import (
    CAN_PIN,
    OURS,
    PEERS,
    REPOSITORY,
    Service,
    Side,
    SideFailedError,
    pin,
    present,
    serving,
)
from emu_ray.generation import Generator
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel

SATURATED = "full"
COMPARED = "0.9"
DUELS = 3
# The first job of each load: no two loads ask for one prompt, whose text features are cached.
FIRST = {COMPARED: 0, SATURATED: 500, "0.5": 2000, "1.2": 3000}


@dataclass(frozen=True)
class Counts:
    """Requests of each load, by rates in parts of serial capacity."""

    at_rate: dict[str, int]
    saturated: int

    @property
    def loads(self) -> list[str]:
        """In the order in which they are measured."""
        return [*self.at_rate, SATURATED]

    def jobs(self, load: str) -> list[Job]:
        """Of a load."""
        return jobs(self.saturated if load == SATURATED else self.at_rate[load], FIRST[load])


FULL = {
    "small": Counts({"0.5": 60, COMPARED: 120, "1.2": 60}, 96),
    "large": Counts({"0.5": 20, COMPARED: 80, "1.2": 30}, 48),  # pictures of half a second
}
QUICK = {"small": Counts({COMPARED: 25}, 32), "large": Counts({COMPARED: 25}, 16)}


@dataclass(frozen=True)
class Measured:
    """A side under a load. CPU-seconds an image: of the process that draws, and of all."""

    p50_s: float
    p95_s: float
    images_per_s: float
    model_cpu_s: float
    all_cpu_s: float
    errors: int
    wrong: int
    others: float  # cores that processes of neither side took meanwhile: far above 0 the row says little


Round = dict[tuple[str, str], Measured]  # by load and side


def main(quick: bool, models: list[str], peers: list[str]) -> None:
    """Every side with every load; then the ratios."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services end with it
    torch.set_num_threads(1)
    if CAN_PIN:
        pin(os.getpid(), set(sorted(os.sched_getaffinity(0))[1:]))
    sides = present([OURS, *(peer for peer in PEERS if peer.name in peers)])
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="emu_ray-bench-") as work:
        for model, folder in write_models(Path(work)).items():
            if model in models:
                ratios = _compared(model, folder, sides, (QUICK if quick else FULL)[model], 0 if quick else DUELS)
                found |= {f"{name}_{model}": value for name, value in ratios.items()}
        if "small" in models:
            found |= _overhead(Path(work) / "small", 15 if quick else 60)
    for name, worse in (("cpu_vs_bare", max), ("throughput_vs_best_peer", min)):
        values = [found[f"{name}_{model}"] for model in models]
        found[name] = float("nan") if any(math.isnan(value) for value in values) else worse(values)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in sorted(found.items())}))


def _compared(model: str, folder: Path, sides: list[Side], counts: Counts, duels: int) -> dict[str, float]:
    """The ratios of one model."""
    known = reference(folder, [job for load in counts.loads for job in counts.jobs(load)])
    print(f"{model}: the plain pipeline takes {known.mean_service_s * 1000:.0f} ms an image", flush=True)
    first, bare = _round(f"{model} ", sides, counts, known, counts.loads)
    if not duels:
        return _ratios(first, bare)
    contenders = [side for side in sides if side is OURS or side.name in _best(first)]
    ratios = []
    for number in range(duels):
        known = known.now()
        print(f"duel {number + 1}: the plain pipeline takes {known.drift:.2f} of the time that it took", flush=True)
        duel, bare = _round(f"{model} duel ", contenders, counts, known, [COMPARED, SATURATED])
        ratios.append(_ratios(duel, bare))
        print(f"duel {number + 1}: {json.dumps(ratios[-1])}", flush=True)
        contenders.reverse()
    return {name: float(np.median([each[name] for each in ratios])) for name in ratios[0]}


def _round(
    title: str, sides: list[Side], counts: Counts, known: Reference, loads: list[str]
) -> tuple[Round, dict[str, float]]:
    """Each side with each load; and the bare loop, before and after ours is saturated, since the machine's pace drifts within minutes."""
    found: Round = {}
    bare: list[dict[str, float]] = []
    print(f"{title:12}{'load':>5}  {'side':24}{'p50 s':>8}{'p95 s':>8}{'images/s':>9}{'CPU model':>10}{'CPU all':>9}{'errors':>7}{'wrong':>6}{'others':>8}")  # fmt: skip
    for side in sides:
        try:
            with serving(side, known.folder) as service:
                for load in loads:
                    is_judged = side is OURS and load == SATURATED
                    if is_judged:
                        bare.append(_bare(known.folder, counts))
                    found[load, side.name] = one = _under(service, load, counts, known)
                    print(f"{title:12}{load:>5}  {side.name:24}{_row(one)}", flush=True)
                    if is_judged:
                        bare.append(_bare(known.folder, counts))
        except SideFailedError as error:
            if side is OURS:
                raise
            print(f"left out: {error}", flush=True)
    return found, {name: float(np.mean([each[name] for each in bare])) for name in bare[0]}


def _under(service: Service, load: str, counts: Counts, known: Reference) -> Measured:
    assert service.model is not None
    asked, before = counts.jobs(load), service.cpu_s()
    machine_s, own_s = _machine_cpu_s(), time.process_time()
    if load == SATURATED:
        done = closed_loop(service, asked, IN_FLIGHT)
    else:
        done = open_loop(service, asked, poisson(len(asked), float(load) / known.mean_service_s))
    after = service.cpu_s()
    spent = {pid: seconds - before.get(pid, 0.0) for pid, seconds in after.items()}
    others_s = _machine_cpu_s() - machine_s - (time.process_time() - own_s) - sum(spent.values())
    return _measured(done, spent[service.model.pid], sum(spent.values()), others_s / done.wall_s, known)


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + getattr(times, "softirq", 0.0))


def _measured(done: Load, model_cpu_s: float, all_cpu_s: float, others: float, known: Reference) -> Measured:
    drawn = [answer for answer in done.answers if not answer.error]
    for told in sorted({answer.error for answer in done.answers if answer.error})[:2]:
        print(f"  error: {told}", flush=True)
    latencies = [answer.latency_s for answer in drawn] or [float("nan")]
    count = max(1, len(drawn))
    return Measured(
        p50_s=float(np.percentile(latencies, 50)),
        p95_s=float(np.percentile(latencies, 95)),
        images_per_s=len(drawn) / done.wall_s,
        model_cpu_s=model_cpu_s / count,
        all_cpu_s=all_cpu_s / count,
        errors=len(done.answers) - len(drawn),
        wrong=sum(not known.is_right(answer.job, answer.png) for answer in drawn),
        others=others,
    )


def _overhead(folder: Path, count: int) -> dict[str, float]:
    """Pairs of one picture each: over HTTP on a connection that is kept open, and by an engine in this process."""
    with serving(OURS, folder) as service:
        return _overhead_of(service, folder, count)


def _overhead_of(service: Service, folder: Path, count: int) -> dict[str, float]:
    connection = http.client.HTTPConnection(urlsplit(service.address).netloc, timeout=60)
    engine = Engine(SteppedModel(Generator(str(folder)).pipeline))
    beyond_ms = []
    for number in range(count + 3):
        job = Job(f"a photo of {number} blue cubes on a table", number, 10)
        started = time.perf_counter()
        engine.submit(drawing(job)).result()
        alone_s, started = time.perf_counter() - started, time.perf_counter()
        asked = service.side.request(job)
        connection.request("POST", asked.path, json.dumps(asked.body), {"Content-Type": "application/json"})
        service.side.png(connection.getresponse().read())
        beyond_ms.append((time.perf_counter() - started - alone_s) * 1000)
    engine.close()
    connection.close()
    p50, p95 = np.percentile(beyond_ms[3:], [50, 95])
    print(f"HTTP and Serve add {p50:.1f} ms to a request on the idle service (p95 {p95:.1f})", flush=True)
    return {"overhead_ms_p50": float(p50), "overhead_ms_p95": float(p95)}


def _bare(folder: Path, counts: Counts) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.serving_bare", str(folder), "1", str(counts.saturated), str(FIRST[SATURATED])]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    told: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"without HTTP, {told['requests']:.1f} requests a pass: engine {told['engine_s'] * 1000:.1f} CPU-ms an image, "
        f"bare loop {told['bare_s'] * 1000:.1f}",
        flush=True,
    )
    return told


def _ratios(measured: Round, bare: dict[str, float]) -> dict[str, float]:
    """Of one round. NaN where no peer answered rightly, or ours didn't."""
    return {
        "p95_vs_best_peer": _vs_best(measured, COMPARED, "p95_s", min),
        "throughput_vs_best_peer": _vs_best(measured, SATURATED, "images_per_s", max),
        "cpu_vs_bare": measured[SATURATED, OURS.name].model_cpu_s / bare["bare_s"],
        "engine_vs_bare": bare["engine_s"] / bare["bare_s"],
    }


def _best(measured: Round) -> set[str]:
    """The peer of the shortest p95 and that of the most images/s."""
    shortest, most = _right(measured, COMPARED, "p95_s"), _right(measured, SATURATED, "images_per_s")
    for each in (shortest, most):
        each.pop(OURS.name, None)
    return {*sorted(shortest, key=shortest.__getitem__)[:1], *sorted(most, key=most.__getitem__)[-1:]}


def _right(measured: Round, load: str, what: str) -> dict[str, float]:
    """By side, of those without an error or a wrong picture."""
    return {
        side: getattr(one, what)
        for (its_load, side), one in measured.items()
        if its_load == load and not one.errors and not one.wrong
    }


def _vs_best(measured: Round, load: str, what: str, best: Callable[[Iterable[float]], float]) -> float:
    sides = _right(measured, load, what)
    ours = sides.pop(OURS.name, float("nan"))
    return ours / best(sides.values()) if sides else float("nan")


def _row(one: Measured) -> str:
    return (
        f"{one.p50_s:8.2f}{one.p95_s:8.2f}{one.images_per_s:9.2f}{one.model_cpu_s:10.4f}{one.all_cpu_s:9.4f}"
        f"{one.errors:7}{one.wrong:6}{one.others:8.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--quick", action="store_true", help="few requests, at one rate, and no duels")
    parser.add_argument("--only", choices=list(FULL), help="one of the models")
    parser.add_argument(
        "--peers", nargs="+", choices=[peer.name for peer in PEERS], help="some of the peers", metavar="NAME"
    )
    given = parser.parse_args()
    main(given.quick, [given.only] if given.only else list(FULL), given.peers or [peer.name for peer in PEERS])
