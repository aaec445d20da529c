"""Start the tuned model's HTTP service on a Ray that is already connected, and say where it answers."""

import http.client
import json
import time
import urllib.error
import urllib.request

import ray
from ray import serve as ray_serve

from emu_ray.errors import ResourceError
from emu_ray.session.ports import check_ports
from serve.app import app
from serve.args import ServeArgs

APPLICATION = "emu_ray"
ANSWERS_WITHIN_S = 20.0


def deploy(args: ServeArgs, port: int, host: str = "127.0.0.1") -> str:
    """The address, `http://HOST:PORT`, of the service once it answers; the call does not block afterwards.

    PortInUseError before anything is started when another program listens there; RecipeError for a port outside 1 to
    65535; InputError for a missing checkpoint; ResourceError when this Ray already serves at another address.
    """
    if not ray.is_initialized():
        raise ResourceError("serving needs a connected Ray; call ray.init() or start it with `ray start --head` first")
    application = app(args)
    check_ports({"--port": port}, host)
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    ray_serve.run(application, name=APPLICATION, route_prefix="/")
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _check_it_answers(address)
    return address


def _check_it_answers(address: str) -> None:
    until = time.monotonic() + ANSWERS_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=60) as answer:
                told = json.load(answer)
            break
        except (urllib.error.URLError, ValueError, OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and (said := _said(error)):
                raise ResourceError(f"the service was deployed, but no model answers: {said}") from None
            if time.monotonic() < until:  # a proxy may learn of the service a moment after it was deployed
                time.sleep(0.2)
                continue
            raise ResourceError(
                f"the service was deployed but {address}/readyz does not answer ({error}); does this Ray already serve at "
                "another address? `serve status` and `serve shutdown` tell and end it"
            ) from None
    if told.get("status") not in ("ok", "degraded"):
        raise ResourceError(f"{address}/readyz answers, but another program does; choose another port")
    for name, state in told["models"].items():
        if state.startswith("failed"):
            print(f"warning: the model {name} is not served, {state}; the others are", flush=True)


def _said(error: urllib.error.HTTPError) -> str:
    """What the service itself says is wrong; "" where another one answered in its place."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
        return ""
