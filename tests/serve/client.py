"""A plain client of the served models, for tests."""

from __future__ import annotations

import base64
import io
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

IMAGES = "/v1/images/generations"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def send(url: str, body: bytes | None = None, method: str | None = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def draw(address: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    return send(address + IMAGES, json.dumps({"prompt": "a red ball", "steps": 2, **fields}).encode())


def pixels(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))), dtype=np.int16)


def events(answer: Any) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def stream(address: str, **fields: Any) -> Any:
    body = json.dumps({"prompt": "a red ball", "stream": True, **fields}).encode()
    return urllib.request.urlopen(urllib.request.Request(address + IMAGES, data=body), timeout=60)


def left_open(address: str, **fields: Any) -> socket.socket:
    """A client that has asked and not read its answer: closing it is leaving."""
    body = json.dumps({"prompt": "a red ball", **fields}).encode()
    split = urlsplit(address)
    client = socket.create_connection((split.hostname or "", split.port or 0))
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: {split.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client
