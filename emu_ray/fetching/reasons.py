"""Why a URL gave no picture: one flat list, the column `fetch_error` of the pool."""

from __future__ import annotations

REFUSED_URL = (  # known from the URL alone, before any socket
    "invalid_url",  # empty, too long, control characters, backslashes, no host, or a host that no name can have
    "scheme_not_allowed",  # neither http nor https
    "userinfo_not_allowed",  # user@host
    "port_not_allowed",
)
NETWORK = ("dns_failure", "connection_failed", "timeout", "tls_failed")  # what a broken network gives for every URL
FETCH_REASONS = (
    *REFUSED_URL,
    "address_not_public",  # the host is, or one of its addresses is, private, loopback, link-local, reserved, metadata
    *NETWORK,
    "bad_redirect",  # without a target, or to an invalid one; a refused target gives the reason of its refusal
    "too_many_redirects",
    "http_401",
    "http_403",
    "http_404",
    "http_410",
    "http_429",
    "http_4xx",
    "http_5xx",
    "protocol_error",  # not HTTP, an odd status, or headers beyond bounds
    "encoding_not_allowed",  # compressed although we asked for none: a few bytes could unfold to gigabytes
    "truncated",  # the connection ended before the body did
    "too_large",
    "opted_out",  # X-Robots-Tag says that it may not be used
    "not_image",  # HTML, nothing at all, no known header, or one that claims too many pixels
    "placeholder",  # a known "image not available" picture
    "deadline",  # not done when the shard's time was up
)


class FetchFailed(Exception):
    """Ends an attempt at a URL with one of FETCH_REASONS; never leaves this room."""

    def __init__(self, reason: str, *, is_temporary: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_temporary = is_temporary
        self.retry_after_s = retry_after_s
