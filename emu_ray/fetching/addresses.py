"""Which URLs and which addresses may be asked at all: a list of URLs from the web must not reach into our own network.

Pure functions. A host is judged by what yarl makes of it, and the very same object goes to the HTTP client: two parsers
that read one URL differently are how such checks are tricked.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Container

from yarl import URL

from emu_ray.fetching.reasons import FetchFailed

MAX_URL_CHARS = 8192
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[A-Za-z0-9._~:/?#\[\]!$&'()*+,;=%@-]+")  # RFC 3986: needs no quoting
_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.?")
_FUTURE = re.compile(r"\[v", re.IGNORECASE)  # an address of a kind that doesn't exist yet
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_REFUSED_4 = [
    ipaddress.IPv4Network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
        "100.64.0.0/10",  # carriers' own, and Alibaba's metadata
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "168.63.129.16/32",  # Azure's metadata: a public number that a virtual machine finds inside
    )
]
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")  # all that is allocated; everything else is local, mapped or reserved
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REFUSED_6 = [
    ipaddress.IPv6Network(net)
    for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")  # Teredo, documentation, 6to4, documentation
]


def checked_url(text: object, allowed_ports: Container[int] = ()) -> URL:
    """The URL, as it may be asked for; FetchFailed names why not. `allowed_ports` come on top of 80 and 443.

    A host that is an address is judged here, in every spelling; a name must still be resolved and its addresses judged.
    """
    url = _parsed(text)
    host = url.raw_host
    if not host:
        raise FetchFailed("invalid_url")
    if url.port not in (80, 443) and url.port not in allowed_ports:
        raise FetchFailed("port_not_allowed")
    _check_host(host)
    return url


@functools.lru_cache(4096)
def is_public(address: str) -> bool:
    """Whether `address`, as a resolver gives it, lies in the public internet; False for what is no address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if "%" in address:  # a scope id: it means something on this machine only
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not found.is_multicast and not any(found in net for net in _REFUSED_4)
    if found in _NAT64:  # what a DNS64 gives for a host that has only IPv4
        return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    is_tunnel_within_a_site = (int(found) >> 32) & 0xFDFFFFFF == 0x5EFE  # ISATAP
    unicast = found in _UNICAST_6 and found.is_global and not any(found in net for net in _REFUSED_6)
    return unicast and not is_tunnel_within_a_site


def _parsed(text: object) -> URL:
    if not isinstance(text, str):
        raise FetchFailed("invalid_url")
    text = text.strip(" \t\r\n")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise FetchFailed("scheme_not_allowed")
    if not scheme or len(text) > MAX_URL_CHARS or text[scheme.end() : scheme.end() + 2] != "//":
        raise FetchFailed("invalid_url")
    authority = re.split(r"[/?#\\]", text[scheme.end() + 2 :], maxsplit=1)[0]
    if _CONTROL.search(text) or "\\" in text or _FUTURE.search(authority):
        raise FetchFailed("invalid_url")
    if "@" in authority:
        raise FetchFailed("userinfo_not_allowed")
    try:
        text.encode()  # a lone surrogate
        url = URL(text)
        if _PLAIN.fullmatch(text):  # as it stands: quoting anew would spoil signed URLs
            verbatim = URL(text, encoded=True)
            url = verbatim if (verbatim.raw_host, verbatim.port) == (url.raw_host, url.port) else url
        str(url).encode("ascii")
    except Exception as error:  # ValueError by its documentation; a hostile URL has no right to anything else
        raise FetchFailed("invalid_url") from error
    if url.scheme not in ("http", "https") or url.raw_user or url.raw_password:
        raise FetchFailed("invalid_url")
    return url


def _check_host(host: str) -> None:
    if ":" in host:
        if not is_public(host):
            raise FetchFailed("address_not_public")
        return
    name = host.removesuffix(".")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        _check_number(name, host)
    elif len(name) > 253 or not _NAME.fullmatch(host):
        raise FetchFailed("invalid_url")
    elif name == "localhost" or name.endswith(".localhost"):
        raise FetchFailed("address_not_public")


def _check_number(name: str, host: str) -> None:
    """Judges what the C library would read as an IPv4 address: 127.1, 2130706433, 0x7f000001 and 017700000001 too."""
    try:
        address = socket.inet_ntoa(socket.inet_aton(name))
    except OSError as error:
        raise FetchFailed("invalid_url") from error
    if not is_public(address):
        raise FetchFailed("address_not_public")
    if address != host:
        raise FetchFailed("invalid_url")
