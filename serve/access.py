"""Who may ask, how often and how much at once: API keys of a file that holds their hashes alone.

A key is 32 random bytes, so a plain SHA-256 can't be turned back. Counts are kept by the process that speaks HTTP, of which there is one.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from emu_ray.errors import InputError
from serve.schemas import ApiError


@dataclass(frozen=True, kw_only=True)
class Key:
    """One line of the file, as JSON."""

    name: str
    sha256: str
    images_per_minute: int
    together: int  # requests at once


class Access:
    """The keys of a file; without one everybody may ask."""

    def __init__(self, keys: list[Key] | None) -> None:
        self._keys = None if keys is None else {key.sha256: key for key in keys}
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._busy: Counter[str] = Counter()

    @asynccontextmanager
    async def entered(self, key: Key | None, images: int) -> AsyncIterator[None]:
        """While a request for so many images is answered. ApiError 429 for too many images or requests of a key."""
        if key is None:
            yield
            return
        limit = RateLimitItemPerMinute(key.images_per_minute)
        if self._busy[key.name] >= key.together:
            raise ApiError(
                429, f"this key may have {key.together} requests at once: wait for one", code="rate_limit_exceeded"
            )
        if images > key.images_per_minute:
            raise ApiError(
                400, f"this key may have {key.images_per_minute} images a minute, found {images}: ask for fewer"
            )
        if not self._limiter.hit(limit, key.name, cost=images):
            told = f"this key may have {key.images_per_minute} images a minute, and asks for {images} more: try again later"
            # not before; who asks for several may be told again
            oldest_leaves_s = self._limiter.get_window_stats(limit, key.name).reset_time - time.time()
            raise ApiError(429, told, code="rate_limit_exceeded", retry_after_s=max(1, math.ceil(oldest_leaves_s)))
        self._busy[key.name] += 1
        try:
            yield
        finally:
            self._busy[key.name] -= 1

    def known(self, authorization: str | None) -> Key | None:
        """Whose key the header holds, None where nobody needs one; ApiError 401 for no key, or one that isn't known."""
        if self._keys is None:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise ApiError(401, "an API key is needed: send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        found = self._keys.get(_hash(given.strip()))
        if found is None:
            raise ApiError(401, "this API key isn't known here", code="invalid_api_key")
        return found


def read_keys(file: str | Path) -> list[Key]:
    """The keys of a file; InputError for one that can't be read, a line that is no key, or a name that comes twice."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{file}: expected a file of API keys, found none that can be read ({error.strerror})"
        ) from error
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            keys.append(Key(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{file}, line {number}: expected a key as `python -m jobs.api_key` writes it, found another line"
            ) from error
    if twice := [name for name, count in Counter(key.name for key in keys).items() if count > 1]:
        raise InputError(f"{file}: expected each name once, found {twice[0]} twice: remove one of its lines")
    return keys


def add_key(file: str | Path, name: str, images_per_minute: int, together: int) -> str:
    """Writes a line for a new key, and returns the key, which is kept nowhere. InputError for a name that has one."""
    file = Path(file)
    if file.exists() and any(key.name == name for key in read_keys(file)):
        raise InputError(f"{file}: {name} has a key already: remove its line first")
    secret = f"emu-{secrets.token_urlsafe(32)}"
    line = Key(name=name, sha256=_hash(secret), images_per_minute=images_per_minute, together=together)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(line)) + "\n")
    return secret


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
