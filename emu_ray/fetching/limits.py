"""What fetching may cost us, and the servers that we ask."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError


def _pace(default: Any) -> Any:
    """A field that may change between two runs over the same list: it decides when we give up, not what we accept."""
    return field(default=default, metadata={"affects_result": False})


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """Bounds of one shard's task; a cluster asks a host at most `connections_per_host` times its tasks at once."""

    max_image_bytes: int = 32 << 20
    max_image_pixels: int = 64_000_000
    allowed_ports: tuple[int, ...] = ()  # besides 80 and 443
    max_redirects: int = 5
    honour_opt_out: bool = True  # False is told in the manifest
    user_agent: str = "emu_ray (fetches images for research; obeys X-Robots-Tag)"
    timeout_s: float = _pace(30.0)  # of a request, once its host is looked up
    connect_timeout_s: float = _pace(10.0)
    read_timeout_s: float = _pace(10.0)  # without a single byte
    retries: int = _pace(2)  # only of what may pass: no connection, a timeout, a cut body, 408, 429, 500, 502, 503, 504
    backoff_s: float = _pace(0.5)  # before the first retry; doubled before each further one
    max_retry_after_s: float = _pace(20.0)  # a server that tells us to wait longer isn't asked again
    connections: int = _pace(64)
    connections_per_host: int = _pace(4)
    dns_threads: int = _pace(32)
    window_bytes: int = _pace(256 << 20)  # of pictures held while earlier rows are under way
    shard_deadline_s: float = _pace(600.0)

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "max_image_bytes", "max_image_pixels", "connections", "connections_per_host", "dns_threads"
        )
        require_at_least(self, 0, "max_redirects", "retries", "backoff_s", "max_retry_after_s")
        require_at_least(self, 0.001, "timeout_s", "connect_timeout_s", "read_timeout_s", "shard_deadline_s")
        require_at_least(self, self.max_image_bytes, "window_bytes")
        if not re.fullmatch(r"[!-~][ -~]*", self.user_agent):
            raise RecipeError(f"user_agent must be printable ASCII and not empty, found {self.user_agent!r}")

    @property
    def agent(self) -> str:
        """The product token by which a server's X-Robots-Tag may address us."""
        return re.split(r"[/ ]", self.user_agent, maxsplit=1)[0]
