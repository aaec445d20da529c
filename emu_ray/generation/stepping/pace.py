"""How long a pass of the U-Net takes by its rows: measured at the start, corrected by every pass. Batching pays up to the knee of this curve.

On small networks a pass of eight rows costs little more than one of one; at 1024 px on a large one it costs eight times as much, and to
wait for company is to lose.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

LEAST_GAIN = 0.05  # per row, for which a batch is made larger
# Weights of the newest pass: for the whole curve, for its own point, and for the point of a trial, which compares with the pass before it.
WHOLE_CORRECTION, POINT_CORRECTION, TRIAL_CORRECTION = 0.2, 0.03, 0.5
QUIET_PASSES = 1000
LARGEST_DELAY = 2.0  # beyond it a pass was held up, which says nothing of its size


class Pace:
    """Seconds of a pass by its rows, for latents of one shape."""

    def __init__(self, seconds: dict[int, float]) -> None:
        """Measured ones, by rows; at least for one row."""
        self._rows = np.array(sorted(seconds))
        self._seconds = np.array([seconds[rows] for rows in self._rows], dtype=float)
        self._most: int | None = None  # more don't fit into memory
        self._quiet = 0  # passes since memory ran out
        self._cap: int | None = None  # known until the next note

    def seconds(self, rows: int) -> float:
        """Of a pass with so many rows; between measured ones on a line, beyond them by the last one's cost of a row."""
        if rows > self._rows[-1]:
            return float(self._seconds[-1] * rows / self._rows[-1])
        return float(np.interp(rows, self._rows, self._seconds))

    def note(self, rows: int, seconds: float) -> None:
        """Corrects the curve by what a pass took; points stay ascending.

        A machine that is busy with other things is slower at every size: a pass says as much of the whole curve as of its own point.
        """
        is_trial, self._cap = rows > self.cap, None
        self._quiet += 1
        if self._most is not None and self._quiet >= QUIET_PASSES:
            self._most, self._quiet = 2 * self._most, 0
        if rows >= 1.5 * self._rows[-1]:
            self._rows, self._seconds = np.append(self._rows, rows), np.append(self._seconds, seconds)
            self._seconds = np.maximum.accumulate(self._seconds)
            return
        off = min(seconds / self.seconds(rows), LARGEST_DELAY)
        self._seconds *= off**WHOLE_CORRECTION
        nearest = int(np.abs(np.log(self._rows / rows)).argmin())
        self._seconds[nearest] *= off ** (TRIAL_CORRECTION if is_trial else POINT_CORRECTION)
        self._seconds = np.maximum.accumulate(self._seconds)

    def is_tried(self, rows: int) -> bool:
        """Whether so many were measured."""
        return bool(self._rows[-1] >= rows)

    @property
    def trial(self) -> int:
        """Rows to try now and then: what was measured beside other work, or long ago, may have put the knee too low."""
        return 2 * self.cap if self._most is None else min(2 * self.cap, self._most)

    def shrink(self, rows: int) -> None:
        """A pass of so many rows ran out of memory: so many are not made again before QUIET_PASSES others, since the cause may have gone."""
        self._cap = None
        self._most, self._quiet = max(1, rows // 2), 0

    @property
    def cap(self) -> int:
        """The most rows worth a pass: the fewest that cost next to nothing more a row than the best number of them does."""
        if self._cap is None:
            knee = self._knee()
            self._cap = knee if self._most is None else min(knee, self._most)
        return self._cap

    def _knee(self) -> int:
        a_row = self._seconds / self._rows
        return int(self._rows[np.argmax(a_row <= (1 + LEAST_GAIN) * a_row.min())])


def measured(run: Callable[[int], None], most: int, repeats: int = 3) -> Pace:
    """The pace of `run`, a whole pass of so many rows, for 1, 2, 4, ... rows to a size past the knee, to `most`, or to where memory ends."""
    seconds: dict[int, float] = {}
    rows, past = 1, 0
    while rows <= most and past < 2:  # one alone may have been measured while the machine was busy
        try:
            run(rows)  # kernels are chosen, memory is taken
            seconds[rows] = _shortest(run, rows, repeats)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            break
        past = past + 1 if Pace(seconds).cap < rows else 0
        rows *= 2
    return Pace(seconds)


def _shortest(run: Callable[[int], None], rows: int, repeats: int) -> float:
    """Whatever else the machine does only adds to a pass."""
    return min(_timed(run, rows) for _ in range(repeats))


def _timed(run: Callable[[int], None], rows: int) -> float:
    started = time.perf_counter()
    run(rows)
    return time.perf_counter() - started
