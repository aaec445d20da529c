"""The first request to a fresh service, as a user would send it."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx

from emu_ray.errors import ResourceError

PROMPT = "a photo of a red metal ball on the left in a meadow"


def first_request(address: str, picture: str) -> None:
    """Asks for one picture and writes it to the local file `picture`; ResourceError unless the answer holds one."""
    answer = httpx.post(
        f"{address}/v1/images/generations", json={"prompt": PROMPT, "seed": 7}, timeout=120, trust_env=False
    )
    if answer.status_code != 200:
        raise ResourceError(
            f"{address} answered the first request with status {answer.status_code}: {answer.text[:200]}"
        )
    Path(picture).write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    print(f"served: {PROMPT!r} -> {picture}", flush=True)
