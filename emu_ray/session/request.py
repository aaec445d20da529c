"""The first request to a fresh service, as a user would send it."""

from __future__ import annotations

import base64

import httpx

from emu_ray.errors import ResourceError

PROMPT = "a photo of a red metal ball on the left in a meadow"
SEED = 7


def first_request(address: str, timeout_s: float = 120) -> bytes:
    """The PNG that the service at `address` draws; ResourceError unless it answers with one."""
    try:
        answer = httpx.post(
            f"{address}/v1/images/generations",
            json={"prompt": PROMPT, "seed": SEED},
            timeout=timeout_s,
            trust_env=False,
        )
    except httpx.TimeoutException:
        raise ResourceError(
            f"{address} did not answer the first request within {timeout_s:g} s: end other programs and run this again"
        ) from None
    except httpx.HTTPError as error:
        raise ResourceError(
            f"{address} broke off the first request ({error}): the service's log above says why; run this again"
        ) from None
    if answer.status_code != 200:
        raise ResourceError(
            f"{address} answered the first request with status {answer.status_code}: {answer.text[:200]}"
        )
    try:
        return base64.b64decode(answer.json()["data"][0]["b64_json"])
    except (ValueError, LookupError, TypeError):
        raise ResourceError(
            f"{address} answered the first request with something else than a picture: {answer.text[:200]}"
        ) from None
