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

from emu_ray.errors import MemoryShortError, PortInUseError, ResourceError
from emu_ray.session.local_cluster import check_ports
from emu_ray.session.on_ray import check_memory
from emu_ray.session.request import first_request


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} is in use"):
            check_ports([port])


def test_free_ports_pass() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_ports([port])


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


def test_the_first_request_keeps_the_picture(service: str, tmp_path: Path) -> None:
    first_request(service, str(tmp_path / "first.png"))
    assert (tmp_path / "first.png").read_bytes() == b"picture"


def test_a_service_that_refuses_is_an_error(service: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="status 503: no model"):
        first_request(f"{service}/broken", str(tmp_path / "first.png"))


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
            check_ports([port])
            return
        except PortInUseError:
            assert time.monotonic() < until, "the head still listens a minute after its driver was killed"
            time.sleep(0.5)
