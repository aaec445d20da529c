"""Decodes in a child process, for pictures among which one is known to end the process that decodes it.

Native decoders can crash on hostile bytes. Scoring decodes in its own process, which is fast, and comes here only for
the rows at which an actor has died before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

from emu_ray.errors import StationError
from emu_ray.pictures.decode import Decoded

Decode = Callable[[bytes], Decoded]
CRASHED = "the decoder crashed"
TOO_LONG = "the decoder did not end"
START_TIMEOUT_S = 300.0  # of a child, which loads this module on a busy machine


class IsolatedDecoder:
    """A context that decodes one picture after another in a child, which is started anew when it dies or hangs.

    A picture at which the child was killed from outside (SIGKILL, as by a machine out of memory) or did not end in
    time is tried once more in a fresh child: that may have been the machine's fault.
    """

    def __init__(self, decode: Decode, timeout_s: float = 60.0) -> None:
        self._decode, self._timeout_s = decode, timeout_s
        self._child: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, encoded: bytes) -> Decoded:
        """What `decode` gives, or an error that begins with CRASHED or TOO_LONG."""
        found = self._once(encoded)
        if found.error.startswith((f"{CRASHED} with exit code {-signal.SIGKILL}", TOO_LONG)):
            found = self._once(encoded)
        return found

    def _once(self, encoded: bytes) -> Decoded:
        pipe = self._pipe or self._start()
        try:
            pipe.send_bytes(encoded)
            if not pipe.poll(self._timeout_s):
                self._end()
                return Decoded(None, f"{TOO_LONG} in {self._timeout_s:.0f} s")
            return pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            code = self._end()
            return Decoded(None, f"{CRASHED} with exit code {code}")

    def _start(self) -> Connection:
        """The pipe to a new child that has loaded its modules; StationError when none can be started."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        child = context.Process(target=_serve, args=(there, self._decode), daemon=True)
        child.start()
        there.close()
        self._child, self._pipe = child, here
        try:
            if here.poll(START_TIMEOUT_S) and here.recv():
                return here
        except EOFError:
            pass
        code = self._end()
        raise StationError(
            f"expected a process that decodes pictures to start within {START_TIMEOUT_S:.0f} s, found exit code {code}: "
            "is the machine out of memory or processes?"
        )

    def _end(self) -> int | None:
        child, pipe, self._child, self._pipe = self._child, self._pipe, None, None
        if child is None or pipe is None:
            return None
        pipe.close()
        child.join(1)
        if child.is_alive():
            child.kill()
            child.join()
        return child.exitcode


def _serve(pipe: Connection, decode: Decode) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        pipe.send(True)
        while True:
            pipe.send(decode(pipe.recv_bytes()))
