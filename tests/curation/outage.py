"""A door on loopback before a server, which a test shuts to make the server vanish and opens again."""

from __future__ import annotations

import contextlib
import socket
import threading


class Door:
    """Passes the bytes of every connection on to 127.0.0.1:`port` while it is open; shut, it refuses and cuts them."""

    def __init__(self, port: int) -> None:
        self.behind, self.port = port, 0
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Listen, always on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse new connections and cut those that stand."""
        assert self._listener is not None
        for each in (self._listener, *list(self._connections)):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:
                return
            self._connections |= {near, far}
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while some := source.recv(1 << 16):
            target.sendall(some)
        target.shutdown(socket.SHUT_WR)
