"""URLs, names and redirects that must not be followed: each gets its reason, and no socket is opened."""

from __future__ import annotations

import dataclasses
import random
import socket
from collections.abc import Callable

import pytest

from emu_ray.fetching.addresses import checked_url, is_public
from emu_ray.fetching.fetch import fetch_urls
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network
from emu_ray.fetching.reasons import FETCH_REASONS, FetchFailed
from tests.fetching.loopback import PUBLIC, Server, Web, answer

QUICK = FetchLimits(retries=0)
REFUSED = {
    "file": ("file:///etc/passwd", "scheme_not_allowed"),
    "ftp": ("ftp://pictures.example/a.png", "scheme_not_allowed"),
    "data": ("data:image/png;base64,iVBORw0KGgo=", "scheme_not_allowed"),
    "long-data": ("data:image/png;base64," + "A" * 100_000, "scheme_not_allowed"),
    "javascript": ("javascript:alert(1)", "scheme_not_allowed"),
    "gopher": ("gopher://pictures.example:80/_GET", "scheme_not_allowed"),
    "name-and-port-only": ("localhost:80/a.png", "scheme_not_allowed"),
    "empty": ("", "invalid_url"),
    "none": (None, "invalid_url"),
    "number": (7, "invalid_url"),
    "spaces": ("   ", "invalid_url"),
    "space-in-host": ("http://pictures example/a.png", "invalid_url"),
    "no-scheme": ("//pictures.example/a.png", "invalid_url"),
    "no-slashes": ("http:pictures.example/a.png", "invalid_url"),
    "one-slash": ("http:/pictures.example/a.png", "invalid_url"),
    "no-host": ("http:///a.png", "invalid_url"),
    "only-scheme": ("http://", "invalid_url"),
    "empty-label": ("http://a..example/a.png", "invalid_url"),
    "only-dot": ("http://./a.png", "invalid_url"),
    "long-label": (f"http://{'a' * 64}.example/", "invalid_url"),
    "long-name": (f"http://{'a.' * 130}example/", "invalid_url"),
    "percent-in-host": ("http://127%2e0%2e0%2e1/", "invalid_url"),
    "open-bracket": ("http://[::1/", "invalid_url"),
    "future-literal": ("http://[v1.a]/", "invalid_url"),
    "lone-surrogate": ("http://pictures.example/\udc80.png", "invalid_url"),
    "crlf": ("http://pictures.example/a.png\r\nHost: internal\r\n\r\n", "invalid_url"),
    "crlf-in-host": ("http://pictures.example\r\n/a.png", "invalid_url"),
    "nul": ("http://pictures.example/\x00.png", "invalid_url"),
    "very-long": ("http://pictures.example/" + "a" * 9000, "invalid_url"),
    "backslash-host": ("http://127.0.0.1\\@pictures.example/", "invalid_url"),
    "backslash-path": ("http://pictures.example\\a.png", "invalid_url"),
    "backslash-in-path": ("http://pictures.example/a\\b.png", "invalid_url"),
    "userinfo-loopback": ("http://good@127.0.0.1/", "userinfo_not_allowed"),
    "userinfo-name": ("http://127.0.0.1@pictures.example/", "userinfo_not_allowed"),
    "userinfo-password": ("http://a:b@pictures.example/", "userinfo_not_allowed"),
    "userinfo-twice": ("http://pictures.example@x@127.0.0.1/", "userinfo_not_allowed"),
    "port-22": ("http://pictures.example:22/", "port_not_allowed"),
    "port-0": ("http://pictures.example:0/", "port_not_allowed"),
    "port-6379": ("https://pictures.example:6379/", "port_not_allowed"),
    "port-99999": ("http://pictures.example:99999/", "invalid_url"),
    "port-word": ("http://pictures.example:ssh/", "invalid_url"),
    "loopback": ("http://127.0.0.1/", "address_not_public"),
    "loopback-dot": ("http://127.0.0.1./", "address_not_public"),
    "loopback-other": ("http://127.8.8.8/", "address_not_public"),
    "loopback-short": ("http://127.1/", "address_not_public"),
    "loopback-decimal": ("http://2130706433/", "address_not_public"),
    "loopback-hexadecimal": ("http://0x7f000001/", "address_not_public"),
    "loopback-hexadecimal-parts": ("http://0x7f.0.0.0X1/", "address_not_public"),
    "loopback-octal": ("http://017700000001/", "address_not_public"),
    "loopback-octal-parts": ("http://0177.0.0.1/", "address_not_public"),
    "loopback-ideographic-dots": ("http://127。0。0。1/", "address_not_public"),
    "loopback-full-width": ("http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/", "address_not_public"),
    "public-decimal": ("http://1572395042/", "invalid_url"),
    "number-too-large": ("http://256.256.256.256/", "invalid_url"),
    "name-ending-in-number": ("http://pictures.1/", "invalid_url"),
    "unspecified": ("http://0.0.0.0/", "address_not_public"),
    "zero": ("http://0/", "address_not_public"),
    "localhost": ("http://localhost/", "address_not_public"),
    "localhost-dot": ("http://LOCALHOST./", "address_not_public"),
    "localhost-below": ("http://a.localhost/", "address_not_public"),
    "localhost-circled": ("http://ⓛocalhost/", "address_not_public"),
    "ten": ("http://10.1.2.3/", "address_not_public"),
    "one-seven-two": ("http://172.16.0.1/", "address_not_public"),
    "one-nine-two": ("http://192.168.1.1/", "address_not_public"),
    "carrier": ("http://100.64.0.1/", "address_not_public"),
    "metadata": ("http://169.254.169.254/latest/meta-data/", "address_not_public"),
    "metadata-decimal": ("http://2852039166/", "address_not_public"),
    "metadata-alibaba": ("http://100.100.100.200/", "address_not_public"),
    "metadata-azure": ("http://168.63.129.16/", "address_not_public"),
    "metadata-ipv6": ("http://[fd00:ec2::254]/", "address_not_public"),
    "multicast": ("http://224.0.0.1/", "address_not_public"),
    "reserved": ("http://240.0.0.1/", "address_not_public"),
    "broadcast": ("http://255.255.255.255/", "address_not_public"),
    "documentation": ("http://192.0.2.1/", "address_not_public"),
    "benchmark": ("http://198.18.0.1/", "address_not_public"),
    "ipv6-loopback": ("http://[::1]/", "address_not_public"),
    "ipv6-unspecified": ("http://[::]/", "address_not_public"),
    "ipv6-mapped": ("http://[::ffff:127.0.0.1]/", "address_not_public"),
    "ipv6-mapped-hexadecimal": ("http://[::ffff:7f00:1]/", "address_not_public"),
    "ipv6-compatible": ("http://[::127.0.0.1]/", "address_not_public"),
    "ipv6-link-local": ("http://[fe80::1]/", "address_not_public"),
    "ipv6-scope": ("http://[fe80::1%25eth0]/", "address_not_public"),
    "ipv6-scope-on-public": ("http://[2606:4700::1111%25eth0]/", "address_not_public"),
    "ipv6-site": ("http://[fec0::1]/", "address_not_public"),
    "ipv6-unique-local": ("http://[fc00::1]/", "address_not_public"),
    "ipv6-multicast": ("http://[ff02::1]/", "address_not_public"),
    "ipv6-documentation": ("http://[2001:db8::1]/", "address_not_public"),
    "nat64-loopback": ("http://[64:ff9b::7f00:1]/", "address_not_public"),
    "nat64-local": ("http://[64:ff9b:1::5db8:d822]/", "address_not_public"),
    "6to4": ("http://[2002:7f00:1::]/", "address_not_public"),
    "teredo": ("http://[2001:0:5ef5:79fd::1]/", "address_not_public"),
    "isatap": ("http://[2606:4700::5efe:7f00:1]/", "address_not_public"),
    "name-of-loopback": ("http://loopback.example/", "address_not_public"),
    "name-of-private-ipv6": ("http://private6.example/", "address_not_public"),
    "name-of-link-local": ("http://linklocal6.example/", "address_not_public"),
    "name-of-one-public-and-one-private": ("http://mixed.example/", "address_not_public"),
    "name-of-metadata": ("https://metadata.example/", "address_not_public"),
    "name-of-nothing": ("http://nothing.example/", "dns_failure"),
    "name-unknown": ("http://unknown.example/", "dns_failure"),
}
NAMES = {
    "loopback.example": ["127.0.0.1"],
    "private6.example": ["fd12::1"],
    "linklocal6.example": ["fe80::1%eth0"],
    "mixed.example": [PUBLIC, "10.0.0.7"],
    "metadata.example": ["169.254.169.254"],
    "nothing.example": [],
}


class HostileWeb(Web):
    def resolve(self, host: str) -> list[str]:
        if host == "unknown.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return list(super().resolve(host))


@pytest.fixture
def hostile(server: Server) -> Web:
    return HostileWeb(server.port, NAMES)


@pytest.mark.parametrize(("url", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refused_url_opens_no_socket(url: object, reason: str, hostile: Web) -> None:
    assert [a.reason for a in fetch_urls([url], QUICK, network=hostile.network)] == [reason]
    assert not hostile.dialled


IN_A_HEADER = {
    name: (url, reason)
    for name, (url, reason) in REFUSED.items()
    if isinstance(url, str) and url.isascii() and url.isprintable() and len(url) < 8000 and name != "no-scheme"
}


@pytest.mark.parametrize(("url", "reason"), IN_A_HEADER.values(), ids=IN_A_HEADER)
def test_a_redirect_to_a_refused_url_is_not_followed(url: str, reason: str, hostile: Web, server: Server) -> None:
    server.routes["/a.png"] = answer(302, Location=url)
    got = [a.reason for a in fetch_urls(["http://pictures.example/a.png"], QUICK, network=hostile.network)]
    assert got == ["bad_redirect" if reason == "invalid_url" else reason]
    assert hostile.dialled == [(PUBLIC, 80)]


def test_good_urls_pass_and_are_asked_for_as_they_stand(
    web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    paths = ["/a.png", "/%7Ea/%e4?q=a+b%2Fc&sig=%2B/=", "/with%20space", "/%C3%BC.png"]
    server.routes = {path: answer(body=picture()) for path in paths}
    urls = [f"http://pictures.example{path}" for path in paths[:2]]
    urls += [
        "http://pictures.example/with space",
        " http://PICTURES.example./ü.png#part\n",
        "http://93.184.216.34/a.png",
        "http://bücher_1.example/a.png",
        "http://pictures.example:8080/a.png",
    ]
    limits = dataclasses.replace(QUICK, allowed_ports=(8080,))
    assert [a.reason for a in fetch_urls(urls, limits, network=web.network)] == [""] * len(urls)
    assert sorted(server.paths()) == sorted([*paths, "/a.png", "/a.png", "/a.png"])
    assert {address for address, _ in web.dialled} == {PUBLIC}
    assert "xn--bcher_1-n2a.example" in web.lookups


def test_a_name_that_answers_differently_later_is_still_dialled_at_the_checked_address(
    server: Server, picture: Callable[..., bytes]
) -> None:
    class Rebinding(Web):
        def resolve(self, host: str) -> list[str]:
            super().resolve(host)
            return [PUBLIC] if len(self.lookups) == 1 else ["127.0.0.1"]

    web = Rebinding(server.port)
    server.routes["/a.png"] = answer(body=picture(), Connection="close")
    limits = dataclasses.replace(QUICK, connections_per_host=1)
    answers = list(fetch_urls(["http://rebinding.example/a.png"] * 5, limits, network=web.network))
    assert [a.reason for a in answers] == [""] * 5
    assert web.dialled == [(PUBLIC, 80)] * 5
    assert len(web.lookups) == 1


def test_the_socket_itself_refuses_an_address_that_slipped_through(web: Web) -> None:
    for address in ("127.0.0.1", "10.0.0.1", "::1", "fe80::1"):
        with pytest.raises(FetchFailed, match="address_not_public"):
            web.network.open_public_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)))
    assert not web.dialled
    web.network.open_public_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 80))).close()


def test_the_system_s_own_doors_are_the_default() -> None:
    assert Network().resolve("127.0.0.1") == ["127.0.0.1"]
    with Network().open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 80))) as opened:
        assert opened.family == socket.AF_INET


def test_a_loop_of_redirects_ends_after_five(web: Web, server: Server) -> None:
    server.routes["/a"] = answer(302, Location="/b")
    server.routes["/b"] = answer(301, Location="http://other.example/a")
    assert [a.reason for a in fetch_urls(["http://loop.example/a"], QUICK, network=web.network)] == [
        "too_many_redirects"
    ]
    assert len(server.requests) == 6


@pytest.mark.parametrize("location", ["b.png", "/b.png", "//other.example/b.png", "HTTP://other.example/b.png"])
def test_a_good_redirect_is_followed(location: str, web: Web, server: Server, picture: Callable[..., bytes]) -> None:
    server.routes["/a.png"] = answer(307, Location=location)
    server.routes["/b.png"] = answer(body=picture())
    (got,) = fetch_urls(["http://pictures.example/a.png"], QUICK, network=web.network)
    assert got == (picture(), "")


def test_no_text_whatever_raises_anything_else() -> None:
    rng = random.Random(0)
    alphabet = "htps:/.@[]%\\ 01279xaé。\udc80\x00\r\n?#&=-_١Ⅷß\u200d"
    passed = 0
    for _ in range(20_000):
        text = rng.choice(["http://", "https://", ""]) + "".join(rng.choices(alphabet, k=rng.randrange(1, 14)))
        try:
            url = checked_url(text)
        except FetchFailed as failed:
            assert failed.reason in FETCH_REASONS
        else:
            passed += 1
            assert str(url).isascii() and url.raw_host and url.port in (80, 443)
            assert not any(c in url.raw_host for c in "%@/\\ :")
    assert passed > 100


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", ["", "example", "127.1", "8.8.8.8 ", "64:ff9b::a00:1", "::ffff:8.8.8.8"])
def test_anything_else_is_not(address: str) -> None:
    assert not is_public(address)
