"""A service on a Ray of its own in this process: python -m tests.serve.own_ray PORT SERVE_ARGS_AS_JSON; prints its address, ends at TERM."""

from __future__ import annotations

import signal
import sys
import threading

import ray
from ray import serve as ray_serve

from emu_ray.session.on_ray import own_dashboard, quiet
from serve.args import ServeArgs
from serve.deploy import deploy


def main(port: str, args: str) -> None:
    """Until it is told to end."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    quiet()
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=150_000_000,
        log_to_driver=False,
        **own_dashboard(OMP_NUM_THREADS="1"),
    )
    print("at", deploy(ServeArgs.model_validate_json(args), int(port)), flush=True)
    ended.wait()
    ray_serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
