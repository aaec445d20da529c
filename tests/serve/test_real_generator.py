"""The service with the project's own Generator, on a pipeline of random weights."""

from __future__ import annotations

import base64
import io
import json
import socket
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from ray import serve as ray_serve

from serve.app import ServeArgs
from serve.deploy import deploy


@pytest.mark.slow
def test_a_picture_of_a_saved_checkpoint_comes_over_http(ray_local: None, checkpoint: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = deploy(ServeArgs(checkpoint=str(checkpoint), num_cpus=0.5), port=port)
    try:
        body = json.dumps({"prompt": "a red ball", "seed": 3, "steps": 2}).encode()
        request = urllib.request.Request(
            f"{address}/v1/images/generations", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (data,) = json.load(answer)["data"]
    finally:
        ray_serve.shutdown()
    picture = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    assert (picture.format, picture.size, data["seed"]) == ("PNG", (16, 16), 3)
