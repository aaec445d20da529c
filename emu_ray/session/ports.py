"""Ports that a run will listen on, checked before anything is started. No Ray here."""

from __future__ import annotations

import errno
import socket
import time

from emu_ray.errors import PortInUseError, RecipeError


def check_ports(ports: dict[str, int], host: str = "127.0.0.1", patience_s: float = 0) -> None:
    """Passes when each port (name of its option -> number) can be listened on at `host`.

    RecipeError for a number outside 1 to 65535, for two equal ones and for a host that is not this machine's;
    PortInUseError when another program still listens after `patience_s`.
    """
    owners: dict[int, str] = {}
    for name, port in ports.items():
        if not 1 <= port <= 65535:
            raise RecipeError(f"{name}: a port is a number from 1 to 65535, found {port}")
        if port in owners:
            raise RecipeError(f"{owners[port]} and {name} must be different ports, found {port} for both")
        owners[port] = name
    for name, port in ports.items():
        deadline = time.monotonic() + patience_s
        while (error := _in_the_way(host, port)) is not None:
            if error.errno != errno.EADDRINUSE:
                raise RecipeError(f"{name}: can't listen on {host}:{port}: {error.strerror}")
            if time.monotonic() > deadline:
                raise PortInUseError(
                    f"port {port} on {host} is in use: end what listens there, or choose another {name}"
                )
            time.sleep(0.5)


def _in_the_way(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on at this moment, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
