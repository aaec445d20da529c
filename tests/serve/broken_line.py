"""A line to a server that breaks in the middle of a long answer, as a network does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def broken_line(address: str, last_byte: int) -> Iterator[str]:
    """The line's own address. Each connection ends after so many bytes from the server, all of them with the context."""
    host, port = address.removeprefix("http://").split(":")
    ends: list[socket.socket] = []

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client = listener.accept()[0]
                server = socket.create_connection((host, int(port)))
                ends.extend((client, server))
                for source, target, limit in ((client, server, float("inf")), (server, client, last_byte)):
                    threading.Thread(target=_pass_on, args=(source, target, limit), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for end in (listener, *ends):
                _hang_up(end)


def _pass_on(source: socket.socket, target: socket.socket, limit: float) -> None:
    with suppress(OSError):  # the other end is gone
        while limit > 0 and (data := source.recv(4096)):
            target.sendall(data)
            limit -= len(data)
    for end in (source, target):
        _hang_up(end)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):  # it did already
        end.shutdown(socket.SHUT_RDWR)
    end.close()
