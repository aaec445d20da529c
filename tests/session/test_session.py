"""What is checked before a Ray is started, and the first request to a service."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from emu_ray.errors import MemoryShortError, PortInUseError, RecipeError, ResourceError
from emu_ray.session.on_ray import cgroup_free_bytes, check_memory
from emu_ray.session.ports import check_ports
from emu_ray.session.request import first_request


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} on 127.0.0.1 is in use"):
            check_ports({"--port": port})


def test_free_ports_pass() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_ports({"--port": port})


def test_a_port_that_its_owner_is_leaving_is_waited_for() -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    leaving = threading.Timer(0.7, taken.close)
    leaving.start()
    check_ports({"--port": taken.getsockname()[1]}, patience_s=20)
    assert taken.fileno() == -1, "it passed while the owner still listened"
    leaving.join()


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        ({"--port": 0}, "--port: a port is a number from 1 to 65535, found 0"),
        ({"--port": 99_999}, "found 99999"),
        ({"--port": 8000, "--dashboard-port": 8000}, "--port and --dashboard-port must be different ports"),
    ],
)
def test_numbers_that_cannot_all_be_ports_are_refused(ports: dict[str, int], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_ports(ports)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""}, None),
        ({"memory.max": "1000\n", "memory.current": "300\n", "memory.stat": "anon 100\ninactive_file 200\n"}, 900),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "100",
                "memory/memory.stat": "total_inactive_file 7",
            },
            907,
        ),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_free_bytes(tmp_path) == free


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(MemoryShortError, match=r"expected at least 1048576\.0 GiB of free memory"):
        check_memory(2**50)
    check_memory(2**20)


class Service(BaseHTTPRequestHandler):
    """Answers like the service, or refuses when the path says so."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        good = not self.path.startswith("/broken")
        body = json.dumps({"data": [{"b64_json": base64.b64encode(b"picture").decode()}]}) if good else "no model"
        self.send_response(200 if good else 503)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_first_request_brings_the_picture(service: str) -> None:
    assert first_request(service) == b"picture"


def test_a_service_that_refuses_is_an_error(service: str) -> None:
    with pytest.raises(ResourceError, match="status 503: no model"):
        first_request(f"{service}/broken")


def test_a_service_that_is_not_there_is_one_sentence() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ResourceError, match=f"127.0.0.1:{port} broke off the first request"):
        first_request(f"http://127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="only util-linux's setpriv can tie the head to its parent")
def test_a_killed_driver_leaves_no_ray_behind() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"from emu_ray.session.local_cluster import LocalCluster\nwith LocalCluster({port}): print('up', flush=True); input()"
    driver = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with driver:
        assert driver.stdout is not None
        assert any(line.strip() == "up" for line in driver.stdout)
        driver.kill()
    until = time.monotonic() + 60
    while True:
        try:
            check_ports({"--port": port})
            return
        except PortInUseError:
            assert time.monotonic() < until, "the head still listens a minute after its driver was killed"
            time.sleep(0.5)
