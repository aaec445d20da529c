"""Start the tuned model's HTTP service on a Ray that is already connected, and say where it answers."""

import errno
import json
import socket
import urllib.error
import urllib.request

import ray
from ray import serve as ray_serve

from emu_ray.errors import PortInUseError, RecipeError, ResourceError
from serve.app import ServeArgs, build
from serve.painter import GeneratorParts

APPLICATION = "emu_ray"


def deploy(args: ServeArgs, port: int, host: str = "127.0.0.1", parts: GeneratorParts | None = None) -> str:
    """The address, `http://HOST:PORT`, of the service once it answers; the call does not block afterwards.

    PortInUseError before anything is started when another program listens there; RecipeError for a port outside 1 to
    65535; InputError for a missing checkpoint; ResourceError when this Ray already serves at another address.
    """
    if not ray.is_initialized():
        raise ResourceError("serving needs a connected Ray; call ray.init() or start it with `ray start --head` first")
    application = build(args, parts)
    check_port_is_free(port, host)
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    ray_serve.run(application, name=APPLICATION, route_prefix="/")
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _check_it_answers(address)
    return address


def check_port_is_free(port: int, host: str = "127.0.0.1") -> None:
    """PortInUseError when something listens at the port, RecipeError when it cannot be one of this machine's."""
    if not 1 <= port <= 65535:
        raise RecipeError(f"a port is a number from 1 to 65535, got {port}")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(
                    f"port {port} on {host} is in use; stop what listens there or choose another port"
                ) from None
            raise RecipeError(f"can't listen on {host}:{port}: {error.strerror}") from None


def _check_it_answers(address: str) -> None:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=60) as answer:
            if json.load(answer).get("status") == "ok":
                return
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise ResourceError(
            f"the service was deployed but {address}/healthz does not answer ({error}); does this Ray already serve at "
            "another address? `serve status` and `serve shutdown` tell and end it"
        ) from None
    raise ResourceError(f"{address}/healthz answers, but another program does; choose another port")
