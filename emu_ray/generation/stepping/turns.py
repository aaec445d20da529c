"""Whose pass is next, and who decodes, among the engines of one device."""

from __future__ import annotations

import threading
import time
from types import TracebackType


class Turns:
    """A lock that goes round: whoever asked first comes first, so that no model's engine keeps another one's waiting for more than a pass."""

    def __init__(self) -> None:
        # Held while pictures are decoded, which is beside the passes: who has a turn and this has the device's memory to himself.
        self.decoding = threading.Lock()
        self._change = threading.Condition()
        self._given = self._served = 0

    def __enter__(self) -> Turns:
        with self._change:
            mine = self._given
            self._given += 1
            while self._served != mine:
                self._change.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._served += 1
            self._change.notify_all()

    def pass_on(self) -> float:
        """Between two steps of a longer turn: lets those that wait go first, and tells how many seconds they took."""
        started = time.perf_counter()
        self.__exit__(None, None, None)
        self.__enter__()
        return time.perf_counter() - started
