"""How long a pass of the U-Net takes by its rows: measured at the start, corrected by every pass. Batching pays up to the knee of this curve.

On small networks a pass of eight rows costs little more than one of one; at 1024 px on a large one it costs eight times as much, and to
wait for company is to lose.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

LEAST_GAIN = 0.05  # per row, for which a batch is made twice as large
CORRECTION = 0.1  # weight of the newest pass


class Pace:
    """Seconds of a pass by its rows, for latents of one shape."""

    def __init__(self, seconds: dict[int, float]) -> None:
        """Measured ones, by rows; at least for one row."""
        self._rows = np.array(sorted(seconds))
        self._seconds = np.array([seconds[rows] for rows in self._rows], dtype=float)
        self._most: int | None = None  # more don't fit into memory

    def seconds(self, rows: int) -> float:
        """Of a pass with so many rows; between measured ones on a line, beyond them by the last one's cost of a row."""
        if rows > self._rows[-1]:
            return float(self._seconds[-1] * rows / self._rows[-1])
        return float(np.interp(rows, self._rows, self._seconds))

    def note(self, rows: int, seconds: float) -> None:
        """Moves the nearest measured point towards what a pass took, or adds one far beyond them; they stay ascending."""
        if rows >= 1.5 * self._rows[-1]:
            self._rows, self._seconds = np.append(self._rows, rows), np.append(self._seconds, seconds)
            self._seconds = np.maximum.accumulate(self._seconds)
            return
        nearest = int(np.abs(np.log(self._rows / rows)).argmin())
        self._seconds[nearest] *= (seconds / self.seconds(rows)) ** CORRECTION
        self._seconds = np.maximum.accumulate(self._seconds)

    def is_tried(self, rows: int) -> bool:
        """Whether so many were measured."""
        return bool(self._rows[-1] >= rows)

    @property
    def trial(self) -> int:
        """Rows to try now and then: what was measured beside other work, or long ago, may have put the knee too low."""
        return 2 * self.cap if self._most is None else min(2 * self.cap, self._most)

    def shrink(self, rows: int) -> None:
        """A pass of so many rows ran out of memory."""
        self._most = max(1, rows // 2)

    @property
    def cap(self) -> int:
        """The most rows worth a pass: the fewest from which twice as many would gain next to nothing a row."""
        cap = int(self._rows[0])
        for rows in self._rows[1:]:
            if self.seconds(int(rows)) / rows > (1 - LEAST_GAIN) * self.seconds(cap) / cap:
                break
            cap = int(rows)
        return cap if self._most is None else min(cap, self._most)


def measured(run: Callable[[int], None], most: int, repeats: int = 3) -> Pace:
    """The pace of `run`, a pass of so many rows, for 1, 2, 4, ... rows up to the knee, to `most`, or to where memory ends."""
    seconds: dict[int, float] = {}
    rows = 1
    while rows <= most:
        try:
            run(rows)  # kernels are chosen, memory is taken
            seconds[rows] = statistics.median(_timed(run, rows) for _ in range(repeats))
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            break
        pace = Pace(seconds)
        if pace.cap < rows:
            break
        rows *= 2
    return Pace(seconds)


def _timed(run: Callable[[int], None], rows: int) -> float:
    started = time.perf_counter()
    run(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
