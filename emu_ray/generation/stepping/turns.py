"""Whose pass is next, who decodes, and who may have all of the memory, among the engines of one device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


class FairLock:
    """A lock that goes round: whoever asked first comes first."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._given = self._served = 0

    def __enter__(self) -> FairLock:
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


class Turns(FairLock):
    """Held for a pass, so that no model's engine keeps another one's waiting for more than that; pictures are decoded beside it.

    Who holds `decoding` never asks for a turn; who has a turn may wait for `decoding`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decoding = FairLock()  # held while pictures are decoded
        self._releases: list[Callable[[], None]] = []

    def add(self, release: Callable[[], None]) -> None:
        """`release` gives back what a model holds beside its weights. It is called by any engine's thread, which then has a turn."""
        self._releases.append(release)

    def remove(self, release: Callable[[], None]) -> None:
        """What was added isn't called any more."""
        if release in self._releases:
            self._releases.remove(release)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For who has a turn: with all of the device's memory but the weights. Nothing is decoded meanwhile, and all was released."""
        with self.decoding:
            for release in list(self._releases):
                release()
            yield

    def pass_on(self) -> float:
        """Between two steps of a longer turn: lets those that wait go first, and tells how many seconds they took."""
        started = time.perf_counter()
        self.__exit__(None, None, None)
        self.__enter__()
        return time.perf_counter() - started
