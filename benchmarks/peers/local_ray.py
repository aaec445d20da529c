"""A Ray of its own for each side of benchmarks/serving.py that serves with Ray Serve: all sides get the same one."""

from __future__ import annotations

import logging
import os
import signal
import sys

from ray import serve


def start() -> None:
    """Connects this process to a fresh local Ray without a dashboard; SIGTERM ends both."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray spells it so): its workers start at 15
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # without it Ray 2.60 warns at start
    import ray

    ray.init(
        address="local",
        num_cpus=4,  # of its bookkeeping: each replica asks for one, and no side has more than three
        num_gpus=0,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def run(application: serve.Application, port: int) -> None:
    """Serves it on loopback."""
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(application, name="images", route_prefix="/")


def stay() -> None:
    """Until SIGTERM."""
    while True:
        signal.pause()
