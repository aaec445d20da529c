"""A list of URLs to pictures or reasons, in the order of the list, from any ordinary thread.

An event loop in a thread of its own does the fetching, so that hashing and writing go on beside it.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import random
import threading
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

from emu_ray.fetching.addresses import checked_url
from emu_ray.fetching.client import Client
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network
from emu_ray.fetching.reasons import FetchFailed
from emu_ray.fetching.window import Window
from emu_ray.ingest.pairs import header_size


class Answer(NamedTuple):
    """What a URL gave: the served bytes as they came, or b"" and one of FETCH_REASONS."""

    image: bytes
    reason: str  # "" = fetched


def fetch_urls(
    urls: Sequence[object],
    limits: FetchLimits | None = None,
    *,
    placeholders: Container[str] = frozenset(),
    network: Network | None = None,
) -> Iterator[Answer]:
    """One answer for each of `urls`, in their order, as soon as all before it are there.

    `placeholders` are sha256 digests (hex) of pictures that stand for missing ones. No URL, whatever its server does,
    raises. What isn't fetched after `limits.shard_deadline_s` gets the reason "deadline" and its connection is closed;
    so does everything when the iterator is closed. Memory: `limits.window_bytes`, one picture, and the read buffers.
    """
    limits = limits or FetchLimits()
    shard = _Shard(urls, limits, network or Network())
    shard.start()
    try:
        for row in range(len(urls)):
            answer = shard.next_answer(row)
            yield answer if answer.reason else _judged(answer, limits, placeholders)
    finally:
        shard.stop()


def _judged(answer: Answer, limits: FetchLimits, placeholders: Container[str]) -> Answer:
    """The answer, or why its bytes are no picture for us; the header is read, no pixel decoded."""
    if placeholders and hashlib.sha256(answer.image).hexdigest() in placeholders:
        return Answer(b"", "placeholder")
    width_px, _ = header_size(answer.image, limits.max_image_pixels)
    return Answer(b"", "not_image") if width_px is None else answer


class _Shard:
    """The thread with the event loop, and the hand-over of answers in order."""

    def __init__(self, urls: Sequence[object], limits: FetchLimits, network: Network) -> None:
        self._urls, self._limits, self._network = urls, limits, network
        self._answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()  # in order
        self._early: dict[int, Answer] = {}  # those whose turn hasn't come
        self._next_row = 0
        self._window = Window(limits.window_bytes)
        self._ended = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fetching", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def next_answer(self, row: int) -> Answer:
        """Wait for the answer of `row`, and free its room in the window: the caller holds it now."""
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        self._loop.call_soon_threadsafe(self._window.hand_on, row)
        return answer

    def stop(self) -> None:
        """Close every connection and end the thread; from the caller's thread."""
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._fetch_all())
            self._loop.run_until_complete(self._ended.wait())  # the last hand-overs still come
        except BaseException as error:  # a fault of ours, raised where the caller waits
            self._answers.put(error)

    def _end(self) -> None:
        self._ended.set()

    async def _fetch_all(self) -> None:
        client = Client(self._limits, self._network, self._window)
        tasks = [asyncio.ensure_future(self._fetch_row(client, row, url)) for row, url in enumerate(self._urls)]
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            everything = asyncio.gather(*tasks, return_exceptions=True)
            either: list[asyncio.Future[Any]] = [everything, ended]
            await asyncio.wait(either, timeout=self._limits.shard_deadline_s, return_when=asyncio.FIRST_COMPLETED)
            unfinished: set[asyncio.Future[None]] = {task for task in tasks if not task.done()}
            while unfinished:  # a request whose own clock runs out at this moment takes our cancelling for that
                for task in unfinished:
                    task.cancel()
                _, unfinished = await asyncio.wait(unfinished, timeout=1)
            for row, task in enumerate(tasks):
                if task.cancelled():
                    self._answer(row, Answer(b"", "deadline"))
                elif error := task.exception():
                    raise error
        finally:
            ended.cancel()
            await client.close()

    async def _fetch_row(self, client: Client, row: int, text: object) -> None:
        try:
            answer = Answer(await self._with_retries(client, row, text), "")
        except FetchFailed as failed:
            answer = Answer(b"", failed.reason)
        self._answer(row, answer)

    async def _with_retries(self, client: Client, row: int, text: object) -> bytes:
        url = checked_url(text, self._limits.allowed_ports)
        jitter = None
        for attempt in range(self._limits.retries + 1):
            try:
                return await client.fetch(row, url)
            except FetchFailed as failed:
                may_pass = failed.is_temporary and failed.retry_after_s <= self._limits.max_retry_after_s
                if not may_pass or attempt == self._limits.retries:
                    raise
                jitter = jitter or random.Random(str(url))  # the same pauses whenever the URL is asked for
                pause_s = self._limits.backoff_s * 2**attempt * jitter.uniform(0.5, 1.5)
                await asyncio.sleep(max(pause_s, failed.retry_after_s))
        raise AssertionError("the last attempt returns or raises")

    def _answer(self, row: int, answer: Answer) -> None:
        self._early[row] = answer
        while self._next_row in self._early:
            self._answers.put(self._early.pop(self._next_row))
            self._next_row += 1
