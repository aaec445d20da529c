"""Replicas by the work that waits: the policy's numbers, and a second replica that Serve starts for it."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve as ray_serve

from serve.access import add_key
from serve.args import ServeArgs
from serve.deploy import deploy
from serve.scaling import METRIC, ByWork


def _wanted(waiting_s: dict[str, float], requests: int) -> int:
    context: Any = SimpleNamespace(aggregated_metrics={METRIC: waiting_s}, total_num_requests=requests)
    return ByWork(seconds_ahead=10.0)(context)[0]


def test_replicas_follow_the_seconds_that_lie_ahead_of_all_of_them() -> None:
    assert _wanted({}, 0) == 0
    assert _wanted({}, 1) == 1, "a size that was never drawn has no seconds yet"
    assert _wanted({"a": 0.0}, 0) == 0
    assert _wanted({"a": 9.0}, 40) == 1, "many short requests are little work"
    assert _wanted({"a": 25.0}, 1) == 3, "one long request is much"
    assert _wanted({"a": 6.0, "b": 6.0}, 2) == 2


@pytest.mark.slow
def test_serve_starts_another_replica_for_much_work_and_none_serves_nobody(
    ray_local: None, checkpoint: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = tmp_path / "keys.jsonl"
    secret = add_key(keys, "alice", images_per_minute=100, together=12)
    args = ServeArgs(
        checkpoint=str(checkpoint), keys_file=str(keys), num_cpus=0.2, min_replicas=0, max_replicas=2, seconds_ahead=0.5, upscale_delay_s=0.5, downscale_delay_s=1
    )  # fmt: skip
    address = deploy(args, port=port)

    def draw(seed: int) -> int:
        body = json.dumps({"prompt": "a ball", "steps": 200, "n": 8, "seed": seed, "size": "auto"}).encode()
        request = urllib.request.Request(
            f"{address}/v1/images/generations", data=body, headers={"Authorization": f"Bearer {secret}"}
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return int(answer.status)

    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            drawings = [pool.submit(draw, seed) for seed in range(12)]
            _until(2)
            with pytest.raises(urllib.error.HTTPError, match="429"):  # a thirteenth at once
                draw(1)
            assert [drawing.result() for drawing in drawings] == [200] * 12
        _until(0)
    finally:
        ray_serve.shutdown()


def _until(replicas: int) -> None:
    deadline = time.monotonic() + 120
    while (found := _running()) != replicas:
        assert time.monotonic() < deadline, f"expected {replicas} replicas, found {found}"
        time.sleep(0.3)


def _running() -> int:
    deployment = ray_serve.status().applications["emu_ray"].deployments["painter"]
    return int(deployment.replica_states.get("RUNNING", 0))
