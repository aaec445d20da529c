"""A server on loopback and the web that leads to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fetching.loopback import Server, Web, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


@pytest.fixture
def web(server: Server) -> Web:
    return Web(server.port)
