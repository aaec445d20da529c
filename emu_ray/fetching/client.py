"""One task's HTTP client: a single attempt at a URL, from its first hop to the bytes or a reason.

It sends no cookies and no referrer, asks no proxy, and follows redirects by hand, each hop checked like the first.
"""

from __future__ import annotations

import asyncio
import email.utils
import re
import socket
import ssl
import time

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from emu_ray.fetching.addresses import checked_url
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network, PublicNames
from emu_ray.fetching.opt_out import is_opted_out
from emu_ray.fetching.reasons import FetchFailed
from emu_ray.fetching.window import Window, WindowFull

REDIRECTS = frozenset({301, 302, 303, 307, 308})
TEMPORARY = frozenset({408, 429, 500, 502, 503, 504})
NAMED_STATUS = frozenset({401, 403, 404, 410, 429})
GUESSED_BYTES = 256 << 10  # of a picture before its server says how large it is
READ_BUFFER_BYTES = 128 << 10  # of each connection
IDLE_S = 4.0  # a connection is kept for the next URL of its host


class Client:
    """Fetches rows of one shard within `limits`; to be made and closed inside the event loop."""

    def __init__(self, limits: FetchLimits, network: Network, window: Window) -> None:
        self._limits = limits
        self._window = window
        self._names = PublicNames(network, limits.dns_threads)
        self._slots = asyncio.Semaphore(limits.connections)
        self._host_slots: dict[str, asyncio.Semaphore] = {}
        connector = aiohttp.TCPConnector(
            resolver=_Resolver(self._names),
            use_dns_cache=False,  # ours remembers what it checked
            socket_factory=network.open_public_socket,
            limit=0,  # counted here, before the clock of a request starts
            keepalive_timeout=IDLE_S,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=limits.timeout_s,
                sock_connect=limits.connect_timeout_s,
                sock_read=limits.read_timeout_s,
                ceil_threshold=60,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=READ_BUFFER_BYTES,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
        self._names.close()

    async def fetch(self, row: int, url: URL) -> bytes:
        """The body that `url` leads to, counted in the window under `row`; FetchFailed says why there is none."""
        for _ in range(self._limits.max_redirects + 1):
            found = await self._hop(row, url)
            if isinstance(found, bytes):
                return found
            url = found
        raise FetchFailed("too_many_redirects")

    async def _hop(self, row: int, url: URL) -> bytes | URL:
        """One request, when its host is looked up and there is a slot and room.

        Nobody waits for a look-up or for room while holding a slot, or on the request's clock.
        """
        await self._names.addresses(url.raw_host or "")  # kept until aiohttp asks for it
        host = (url.raw_host or "").rstrip(".")
        host_slots = self._host_slots.setdefault(host, asyncio.Semaphore(self._limits.connections_per_host))
        wanted_bytes = min(GUESSED_BYTES, self._limits.max_image_bytes)
        while True:
            await self._window.wait(row, wanted_bytes)
            try:
                async with host_slots, self._slots:
                    return await self._request(row, url)
            except WindowFull as full:
                wanted_bytes = full.wanted_bytes
                self._window.give_back(row)
            except BaseException:
                self._window.give_back(row)
                raise

    async def _request(self, row: int, url: URL) -> bytes | URL:
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                robots_tags = response.headers.getall("X-Robots-Tag", ())
                if self._limits.honour_opt_out and is_opted_out(robots_tags, self._limits.agent):
                    raise FetchFailed("opted_out")
                if response.status in REDIRECTS:
                    return self._target(url, response)
                self._check_head(response)
                return await self._body(row, response)
        except (FetchFailed, WindowFull):
            raise
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise FetchFailed("timeout", is_temporary=True) from error
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise FetchFailed("tls_failed") from error
        except aiohttp.ClientPayloadError as error:
            raise FetchFailed("truncated", is_temporary=True) from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise FetchFailed("connection_failed", is_temporary=True) from error
        except Exception as error:  # a hostile answer makes the parsers raise nearly anything
            raise FetchFailed("protocol_error") from error

    def _target(self, url: URL, response: aiohttp.ClientResponse) -> URL:
        """Where a redirect leads, checked like a URL of the list."""
        location = response.headers.get("Location", "").strip()
        try:
            if not location or re.match(r"https?:(?!//)", location, re.IGNORECASE):
                raise FetchFailed("bad_redirect")
            is_whole = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location)
            return checked_url(location if is_whole else _joined(url, location), self._limits.allowed_ports)
        except FetchFailed as failed:
            raise (FetchFailed("bad_redirect") if failed.reason == "invalid_url" else failed) from None

    def _check_head(self, response: aiohttp.ClientResponse) -> None:
        """FetchFailed for a status, a type or an encoding of which we don't read the body."""
        status, headers = response.status, response.headers
        if status >= 400:
            reason = f"http_{status}" if status in NAMED_STATUS else f"http_{min(status // 100, 5)}xx"
            is_temporary = status in TEMPORARY
            raise FetchFailed(reason, is_temporary=is_temporary, retry_after_s=_seconds(headers.get("Retry-After", "")))
        if status != 200:
            raise FetchFailed("bad_redirect" if status >= 300 else "protocol_error")
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchFailed("encoding_not_allowed")
        if response.content_type in ("text/html", "application/xhtml+xml"):
            raise FetchFailed("not_image")

    async def _body(self, row: int, response: aiohttp.ClientResponse) -> bytes:
        length, most = response.content_length, self._limits.max_image_bytes
        if length is not None and "Transfer-Encoding" not in response.headers:
            if length > most:
                raise FetchFailed("too_large")
            self._window.take(row, length)
            return await response.read()  # the parser hands out `length` bytes and no more
        parts: list[bytes] = []
        size = 0
        while part := await response.content.readany():
            size += len(part)
            if size > most:
                raise FetchFailed("too_large")
            try:
                self._window.take(row, len(part))
            except WindowFull:  # how much is still to come is unknown: not again for each bit of room
                raise WindowFull(most) from None
            parts.append(part)
        return b"".join(parts)


class _Resolver(AbstractResolver):
    """Gives aiohttp the checked addresses; it asks for every connection to a name."""

    def __init__(self, names: PublicNames) -> None:
        self._names = names

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._names.addresses(host)
        ]

    async def close(self) -> None:
        """The names are closed by the client."""


def _joined(url: URL, location: str) -> str:
    try:
        return str(url.join(URL(location)))
    except ValueError as error:
        raise FetchFailed("bad_redirect") from error


def _seconds(retry_after: str) -> float:
    """The header Retry-After, a number of seconds or a date; 0 for none and for what can't be read."""
    retry_after = retry_after.strip()
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
