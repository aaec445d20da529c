"""The two doors to the network, resolving a name and opening a socket, and the guard before each.

A name is resolved once a shard, all its addresses must be public, and the connection goes to exactly these: a name that
answers differently a moment later (DNS rebinding) changes nothing. The socket's guard checks once more what is dialled.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from emu_ray.fetching.addresses import is_public
from emu_ray.fetching.reasons import FetchFailed

AddressInfo = tuple[Any, ...]  # (family, type, protocol, canonical name, (address, port, ...)), as of getaddrinfo


def resolve_by_system(host: str) -> list[str]:
    """All addresses of a name; OSError when there are none."""
    return list(dict.fromkeys(str(i[4][0]) for i in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))


def open_socket(info: AddressInfo) -> socket.socket:
    """A socket of the address's family, not yet connected."""
    return socket.socket(info[0], info[1], info[2])


@dataclass(frozen=True, kw_only=True)
class Network:
    """How names become addresses and addresses sockets; tests put their own in."""

    resolve: Callable[[str], Sequence[str]] = resolve_by_system
    open_socket: Callable[[AddressInfo], socket.socket] = open_socket

    def open_public_socket(self, info: AddressInfo) -> socket.socket:
        """`open_socket`, only for a public address."""
        if not is_public(str(info[4][0])):
            raise FetchFailed("address_not_public")
        return self.open_socket(info)


class PublicNames:
    """Host names to their public addresses, each looked up once; look-ups run in their own threads."""

    def __init__(self, network: Network, threads: int) -> None:
        self._resolve = network.resolve
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")
        self._lookups: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def addresses(self, host: str) -> Sequence[str]:
        """All addresses, of an address itself; FetchFailed when there are none, or when a single one isn't public."""
        if is_public(host):
            return [host]
        if host not in self._lookups:
            self._lookups[host] = asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, host)
        try:
            found = await asyncio.shield(self._lookups[host])  # others may wait for the same
        except Exception as error:  # OSError; UnicodeError for a name that can't be encoded
            may_pass = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if may_pass or getattr(error, "errno", None) == errno.EMFILE:
                self._lookups.pop(host, None)
            raise FetchFailed("dns_failure", is_temporary=may_pass) from error
        if not found:
            raise FetchFailed("dns_failure")
        if not all(is_public(address) for address in found):
            raise FetchFailed("address_not_public")
        return found

    def close(self) -> None:
        """Let go of look-ups that nobody waits for any more; they end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
