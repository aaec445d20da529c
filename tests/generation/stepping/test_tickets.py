"""The tickets of an engine: who is taken, who leaves, and that everybody is answered."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError

import numpy as np
import pytest

from emu_ray.generation.stepping.tickets import (
    CancelledDrawing,
    Drawing,
    EngineClosedError,
    Ticket,
    Tickets,
    Watcher,
)


class _Ended(Watcher):
    def __init__(self) -> None:
        self.how: list[str] = []

    def ended(self, how: str) -> None:
        self.how.append(how)


@pytest.fixture
def watcher() -> _Ended:
    return _Ended()


@pytest.fixture
def tickets(watcher: _Ended) -> Tickets[Ticket]:
    return Tickets(watcher)


def _added(tickets: Tickets[Ticket], count: int) -> list[Ticket]:
    found = [Ticket(drawing=Drawing(prompt="a", seed=i), steps=2, tell=print, number=i) for i in range(count)]
    for ticket in found:
        tickets.add(ticket)
    return found


def test_who_is_cancelled_is_answered_and_the_others_are_taken_oldest_first(
    tickets: Tickets[Ticket], watcher: _Ended
) -> None:
    first, second, third = _added(tickets, 3)
    second.cancel()
    assert tickets.awaited() == tickets.now() == [first, third]
    with pytest.raises(CancelledDrawing):
        second.result(0)
    assert watcher.how == ["cancelled"] and not first.future.done()


def test_who_comes_ends_the_waiting(tickets: Tickets[Ticket]) -> None:
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(tickets.awaited)
        with pytest.raises(NotYetError):
            taken.result(0.05)
        added = _added(tickets, 1)
        assert taken.result(5) == added


def test_closing_at_once_answers_all_and_takes_no_more(tickets: Tickets[Ticket], watcher: _Ended) -> None:
    waiting = _added(tickets, 3)
    tickets.close(at_once=True)
    assert tickets.awaited() is None and tickets.now() == []
    for ticket in waiting:
        with pytest.raises(CancelledDrawing):
            ticket.result(0)
    assert watcher.how == ["cancelled"] * 3
    with pytest.raises(EngineClosedError):
        _added(tickets, 1)


def test_closing_later_waits_until_the_last_has_left(tickets: Tickets[Ticket]) -> None:
    first, second = _added(tickets, 2)
    closing = threading.Thread(target=lambda: tickets.close(at_once=False))
    closing.start()
    assert tickets.leave([first]) == [first]
    closing.join(0.05)
    assert closing.is_alive() and not second.is_cancelled
    tickets.leave([second])
    closing.join(5)
    assert not closing.is_alive() and tickets.awaited() is None


def test_who_left_is_not_failed_afterwards(tickets: Tickets[Ticket], watcher: _Ended) -> None:
    drawn, failing = _added(tickets, 2)
    tickets.leave([drawn])
    tickets.fail([drawn, failing], ValueError("a bad pass"))
    drawn.future.set_result(np.zeros((1, 1, 3), np.uint8))
    assert drawn.result(0).shape == (1, 1, 3) and watcher.how == ["failed"]
    with pytest.raises(ValueError, match="a bad pass"):
        failing.result(0)


def test_an_error_of_who_looks_on_leaves_nobody_without_an_answer() -> None:
    class Broken(Watcher):
        def ended(self, how: str) -> None:
            raise RuntimeError("no exporter")

    tickets = Tickets[Ticket](Broken())
    failing = _added(tickets, 2)
    tickets.fail(failing, ValueError("a bad pass"))
    for ticket in failing:
        with pytest.raises(ValueError, match="a bad pass"):
            ticket.result(0)


def test_a_client_that_cancels_the_future_keeps_nobody_from_an_answer(tickets: Tickets[Ticket]) -> None:
    some = _added(tickets, 3)
    assert not some[0].future.cancel()
    tickets.fail(some, ValueError("a bomb"))
    assert all(isinstance(ticket.future.exception(1), ValueError) for ticket in some)
