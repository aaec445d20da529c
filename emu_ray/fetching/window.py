"""How many bytes of pictures a shard may hold while rows that finished early wait for those before them."""

from __future__ import annotations

import asyncio
import heapq


class WindowFull(Exception):
    """No room for `wanted_bytes` now: give everything back, close the connection, wait, and ask for the row again."""

    def __init__(self, wanted_bytes: int) -> None:
        super().__init__(f"no room for {wanted_bytes} bytes")
        self.wanted_bytes = wanted_bytes


class Window:
    """Counts the bytes of each row from its download until it is handed on.

    The row that is handed on next is never refused, so that the others can't block it: one picture may come on top of
    `limit_bytes`. Not thread-safe: for one event loop.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self._next_row = 0
        self._by_row: dict[int, int] = {}
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def take(self, row: int, count: int) -> None:
        """Room for `count` more bytes of `row`; WindowFull when there is none."""
        if row != self._next_row and self.held_bytes + count > self._limit_bytes:
            raise WindowFull(self._by_row.get(row, 0) + count)
        self.held_bytes += count
        self._by_row[row] = self._by_row.get(row, 0) + count

    def give_back(self, row: int) -> None:
        """The bytes of `row` are gone."""
        self.held_bytes -= self._by_row.pop(row, 0)
        self._wake()

    def hand_on(self, row: int) -> None:
        """`row` left in its turn."""
        self._next_row = row + 1
        self.give_back(row)

    async def wait(self, row: int, count: int) -> None:
        """Return when there may be room for `count` bytes of `row`; the lowest row first."""
        if row == self._next_row or self.held_bytes + count <= self._limit_bytes:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (row, count, woken))
        await woken

    def _wake(self) -> None:
        room = self._limit_bytes - self.held_bytes
        while self._waiting and (self._waiting[0][0] == self._next_row or self._waiting[0][1] <= room):
            _, count, woken = heapq.heappop(self._waiting)
            if not woken.done():
                woken.set_result(None)
                room -= count
