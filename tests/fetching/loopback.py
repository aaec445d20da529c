"""A web on loopback: names resolve to public addresses, and what is dialled there ends at a real server on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emu_ray.fetching.network import AddressInfo, Network

PUBLIC = "93.184.216.34"
Handler = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


class DivertedSocket(socket.socket):
    """Connects to 127.0.0.1 whatever address it is told."""

    port: int

    def connect(self, address: Any) -> None:
        super().connect(("127.0.0.1", self.port))


@dataclass
class Web:
    """Names, the port behind all of them, and a record of look-ups and of dialled addresses."""

    port: int
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # others are PUBLIC
    lookups: list[str] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)

    def resolve(self, host: str) -> Sequence[str]:
        self.lookups.append(host)
        return self.names.get(host, [PUBLIC])

    def open_socket(self, info: AddressInfo) -> socket.socket:
        self.dialled.append(info[4][:2])
        opened = DivertedSocket(info[0], info[1], info[2])
        opened.port = self.port
        return opened

    @property
    def network(self) -> Network:
        return Network(resolve=self.resolve, open_socket=self.open_socket)


class Server:
    """A small HTTP server on a free port: `routes` maps paths to handlers; requests are recorded as they came."""

    def __init__(self) -> None:
        self.routes: dict[str, Handler] = {}
        self.requests: list[str] = []
        self.open_by_host: Counter[str] = Counter()
        self.most_open_by_host: dict[str, int] = defaultdict(int)
        self.most_open = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def paths(self) -> list[str]:
        return [request.split(" ")[1] for request in self.requests]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=500)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                host = request.lower().split("\r\nhost: ")[1].split("\r\n")[0]
                self.requests.append(request)
                self.open_by_host[host] += 1
                self.most_open_by_host[host] = max(self.most_open_by_host[host], self.open_by_host[host])
                self.most_open = max(self.most_open, self.open_by_host.total())
                try:
                    await self.routes.get(request.split(" ")[1], answer(404))(request, writer)
                    await writer.drain()
                finally:
                    self.open_by_host[host] -= 1
                if writer.is_closing():
                    break
        writer.close()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def head(status: int = 200, **headers: object) -> bytes:
    """A response up to its body; `_` in a header's name is `-`."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name.replace('_', '-')}: {v}" for name, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def answer(status: int = 200, body: bytes = b"", after_s: float = 0, **headers: object) -> Handler:
    """A handler that answers as a good server does."""

    async def respond(request: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        writer.write(head(status, **{"Content_Type": "image/png", **headers, "Content_Length": len(body)}) + body)

    return respond


def raw(*parts: bytes | float, closes: bool = True) -> Handler:
    """A handler that writes the bytes as they are, and sleeps where a number stands."""

    async def respond(request: str, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)
        if closes:
            writer.close()

    return respond


def one_after_another(*handlers: Handler) -> Handler:
    """The first request gets the first handler, and so on; the last one stays."""
    left = list(handlers)

    async def respond(request: str, writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request, writer)

    return respond
