"""Servers that misbehave, servers in trouble and servers that say no: each gives its reason, in bounded time and memory."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import hashlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emu_ray.errors import RecipeError
from emu_ray.fetching.client import _seconds
from emu_ray.fetching.fetch import Answer, fetch_urls
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network
from emu_ray.fetching.opt_out import is_opted_out
from emu_ray.fetching.reasons import FETCH_REASONS
from tests.fetching.loopback import Handler, Server, Web, answer, head, one_after_another, raw

# Patient with servers, since the machine may stand still for seconds; HASTY for those that are to be given up.
QUICK = FetchLimits(
    retries=0, backoff_s=0.01, timeout_s=60, connect_timeout_s=60, read_timeout_s=60, max_image_bytes=100_000
)
HASTY = dataclasses.replace(QUICK, timeout_s=1.5, connect_timeout_s=0.5, read_timeout_s=0.5)
URL = "http://pictures.example/a.png"


def fetch_one(web: Web, handler: Handler, server: Server, limits: FetchLimits = QUICK, **options: object) -> Answer:
    server.routes["/a.png"] = handler
    (got,) = fetch_urls([URL], limits, network=web.network, **options)  # type: ignore[arg-type]
    assert got.reason in ("", *FETCH_REASONS)
    assert bool(got.image) == (not got.reason)
    return got


def drip(times: int) -> list[bytes | float]:
    """A byte now and then."""
    return [b"x", 0.1] * times


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


MISBEHAVIOURS = {
    "endless": (raw(head(), *[b"x" * 40_000] * 50), "too_large"),
    "endless-chunks": (raw(head(Transfer_Encoding="chunked"), *[chunk(b"x" * 40_000)] * 50), "too_large"),
    "says-it-is-too-large": (raw(head(Content_Length=10**12)), "too_large"),
    "length-and-chunks": (
        raw(head(Content_Length=4, Transfer_Encoding="chunked"), *[chunk(b"x" * 40_000)] * 9),
        "protocol_error",
    ),
    "negative-length": (raw(head(Content_Length=-5), b"abc"), "protocol_error"),
    "two-lengths": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nabcdefg"),
        "protocol_error",
    ),
    "slow-loris": (raw(head(Content_Length=1000), *drip(40)), "timeout"),
    "slow-head": (raw(b"HTTP/1.1 200 OK\r\nX: ", *drip(40)), "timeout"),
    "stalled-body": (raw(head(Content_Length=1000), b"x" * 500, 5.0), "timeout"),
    "says-nothing": (raw(5.0), "timeout"),
    "closes-at-once": (raw(), "connection_failed"),
    "truncated": (raw(head(Content_Length=1000), b"x" * 500), "truncated"),
    "truncated-chunks": (raw(head(Transfer_Encoding="chunked"), chunk(b"x" * 500)), "truncated"),
    "broken-chunks": (
        raw(head(Transfer_Encoding="chunked"), 0.2, b"zzz\r\nabc\r\n"),
        "timeout",
    ),  # aiohttp 3.14 doesn't tell
    "gzip": (answer(body=b"\x1f\x8b\x08" + b"x" * 99, Content_Encoding="gzip"), "encoding_not_allowed"),
    "brotli": (answer(body=b"x" * 99, Content_Encoding="br"), "encoding_not_allowed"),
    "html": (answer(body=b"<html>", Content_Type="text/html; charset=utf-8"), "not_image"),
    "html-called-png": (answer(body=b"<html><body>no such picture</body></html>"), "not_image"),
    "nothing": (answer(body=b""), "not_image"),
    "no-head": (raw(b"just bytes\r\n\r\n"), "protocol_error"),
    "huge-header": (raw(b"HTTP/1.1 200 OK\r\nX-Huge: " + b"x" * 200_000 + b"\r\n\r\n"), "protocol_error"),
    "endless-headers": (raw(b"HTTP/1.1 200 OK\r\n", *[b"X-H: " + b"x" * 8000 + b"\r\n"] * 200), "protocol_error"),
    "204": (raw(head(204)), "protocol_error"),
    "206": (answer(206, b"x"), "protocol_error"),
    "304": (raw(head(304)), "bad_redirect"),
    "redirect-to-nowhere": (answer(302), "bad_redirect"),
    "400": (answer(400), "http_4xx"),
    "401": (answer(401), "http_401"),
    "403": (answer(403), "http_403"),
    "404": (answer(404), "http_404"),
    "410": (answer(410), "http_410"),
    "429": (answer(429), "http_429"),
    "451": (answer(451), "http_4xx"),
    "500": (answer(500), "http_5xx"),
    "501": (answer(501), "http_5xx"),
    "999": (answer(999), "http_5xx"),
}


@pytest.mark.parametrize(("handler", "reason"), MISBEHAVIOURS.values(), ids=MISBEHAVIOURS)
def test_a_server_that_misbehaves_gives_a_reason(handler: Handler, reason: str, web: Web, server: Server) -> None:
    started = time.monotonic()
    limits = HASTY if reason == "timeout" else QUICK
    assert fetch_one(web, handler, server, limits).reason == reason
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("kind", ["length", "chunks", "until-the-end"])
def test_a_picture_comes_as_it_was_served(
    kind: str, web: Web, server: Server, noise_picture: Callable[..., bytes]
) -> None:
    image = noise_picture()
    handlers = {
        "length": answer(body=image, Content_Type="application/octet-stream"),
        "chunks": raw(head(Transfer_Encoding="chunked"), *(chunk(image[i : i + 999]) for i in range(0, len(image), 999)), chunk(b"")),
        "until-the-end": raw(head(), image),
    }  # fmt: skip
    assert fetch_one(web, handlers[kind], server) == (image, "")


def test_a_header_that_claims_too_many_pixels_is_no_image(
    web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    image = picture(width_px=40, height_px=50)
    assert fetch_one(web, answer(body=image), server, dataclasses.replace(QUICK, max_image_pixels=2000)).reason == ""
    less = dataclasses.replace(QUICK, max_image_pixels=1999)
    assert fetch_one(web, answer(body=image), server, less).reason == "not_image"


def test_a_picture_that_is_called_a_page_is_not_read(web: Web, server: Server, picture: Callable[..., bytes]) -> None:
    assert fetch_one(web, answer(body=picture(), Content_Type="text/html"), server).reason == "not_image"


@pytest.mark.parametrize("handler", [raw(5.0), raw(head(Content_Length=1000), b"x" * 500, 5.0)], ids=["head", "body"])
def test_a_server_that_falls_silent_is_left_before_the_whole_time_is_up(
    handler: Handler, web: Web, server: Server
) -> None:
    started = time.monotonic()
    patient = dataclasses.replace(HASTY, timeout_s=60, read_timeout_s=0.3)
    assert fetch_one(web, handler, server, patient).reason == "timeout"
    assert time.monotonic() - started < 8


def test_a_known_placeholder_is_told_by_its_digest(web: Web, server: Server, picture: Callable[..., bytes]) -> None:
    digests = {hashlib.sha256(picture(1)).hexdigest()}
    assert fetch_one(web, answer(body=picture(1)), server, placeholders=digests).reason == "placeholder"
    assert fetch_one(web, answer(body=picture(2)), server, placeholders=digests).reason == ""


@pytest.mark.parametrize("failure", [answer(500), answer(503), answer(408), answer(429), raw(), raw(head(Content_Length=9), b"x"), raw(0.8)])  # fmt: skip
def test_what_may_pass_is_tried_again(
    failure: Handler, web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    handler = one_after_another(failure, failure, answer(body=picture()))
    assert fetch_one(web, handler, server, dataclasses.replace(QUICK, retries=2)).reason == ""
    # aiohttp asks once more by itself when a kept connection turns out to be closed, never on a fresh one
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501, 505])
def test_what_will_not_pass_is_tried_once(status: int, web: Web, server: Server) -> None:
    fetch_one(web, answer(status), server, dataclasses.replace(QUICK, retries=2))
    assert len(server.requests) == 1


def test_trying_again_ends(web: Web, server: Server) -> None:
    assert fetch_one(web, answer(503), server, dataclasses.replace(QUICK, retries=2)).reason == "http_5xx"
    assert len(server.requests) == 3


@pytest.mark.parametrize(("cap_s", "reason", "requests"), [(5.0, "", 2), (0.1, "http_429", 1)])
def test_retry_after_is_waited_for_or_beyond_the_cap_nothing_is_asked_again(
    cap_s: float, reason: str, requests: int, web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    started = time.monotonic()
    handler = one_after_another(answer(429, Retry_After=1), answer(body=picture()))
    limits = dataclasses.replace(QUICK, retries=1, max_retry_after_s=cap_s)
    assert fetch_one(web, handler, server, limits).reason == reason
    assert len(server.requests) == requests
    assert (time.monotonic() - started >= 1.0) == (requests == 2)


def test_retry_after_is_read_as_seconds_or_a_date() -> None:
    assert _seconds("7") == 7
    assert 50 < _seconds(email.utils.formatdate(time.time() + 60, usegmt=True)) < 61
    assert [_seconds(text) for text in ("", "-1", "soon", "9" * 50, "Wed, 99 Foo 2020", "1e3")] == [0.0] * 6
    assert _seconds("Fri, 01 Jan 1999 00:00:00 GMT") == 0


@pytest.mark.parametrize(
    ("tag", "is_out"),
    {
        "noai": True,
        "NoAI, NoImageAI": True,
        "noimageai": True,
        "noindex": True,
        "noimageindex": True,
        "none": True,
        "nofollow, noai": True,
        "*: noai": True,
        "emu_ray: noai": True,
        "EMU_RAY: nofollow, noindex": True,
        "otherbot: nofollow, emu_ray: noai": True,
        "unavailable_after: 25 Jun 2030 15:00:00 PST, noai": True,
        "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, noai": True,
        "unavailable_after: Friday, 25-Jun-10 15:00:00 UTC, noindex": True,
        "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, otherbot: noai": False,
        "max-image-preview: large, noindex": True,
        "otherbot: noai": False,
        "otherbot: nofollow, noindex": False,
        "emu_ray: nofollow, otherbot: noai": False,
        "all": False,
        "nofollow, noarchive": False,
        "noaix": False,
        "": False,
    }.items(),
)
def test_a_server_s_no_is_understood(tag: str, is_out: bool) -> None:
    assert is_opted_out([tag], "emu_ray") == is_out
    assert is_opted_out(["nosnippet", tag], "emu_ray") == is_out


def test_an_opted_out_picture_is_not_taken_unless_the_recipe_says_so(
    web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    handler = answer(body=picture(), X_Robots_Tag="emu_ray: noai")
    assert fetch_one(web, handler, server).reason == "opted_out"
    assert fetch_one(web, handler, server, dataclasses.replace(QUICK, user_agent="other/1")).reason == ""
    assert fetch_one(web, handler, server, dataclasses.replace(QUICK, honour_opt_out=False)).reason == ""
    server.routes["/b.png"] = answer(body=picture())
    to_another = answer(302, Location="/b.png", X_Robots_Tag="noai")
    assert fetch_one(web, to_another, server).reason == "opted_out"


def test_a_request_says_who_asks_and_carries_nothing_else(
    web: Web, server: Server, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    server.routes["/b.png"] = answer(body=picture())
    first = answer(302, Location="/b.png", Set_Cookie="a=b; Domain=pictures.example; Path=/")
    assert fetch_one(web, first, server).reason == ""
    names = [{line.split(":")[0].lower() for line in r.split("\r\n")[1:] if line} for r in server.requests]
    assert names == [{"host", "user-agent", "accept", "accept-encoding"}] * 2
    assert "Accept-Encoding: identity" in server.requests[0] and f"User-Agent: {QUICK.user_agent}" in server.requests[0]


def test_connections_to_a_host_are_bounded_and_hosts_do_not_wait_for_each_other(
    web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    server.routes = {f"/{i}": answer(body=picture(i), after_s=0.02) for i in range(30)}
    server.routes["/hop"] = answer(302, Location="http://busy.example/0", after_s=0.02)
    urls = [f"http://busy.example/{i}" for i in range(30)] + [f"http://h{i}.example/hop" for i in range(20)]
    limits = dataclasses.replace(QUICK, connections=12, connections_per_host=3)
    assert [a.reason for a in fetch_urls(urls, limits, network=web.network)] == [""] * 50
    assert server.most_open_by_host["busy.example"] == 3
    assert 8 < server.most_open <= 12


def test_answers_keep_the_order_of_the_urls_whoever_is_slow(
    web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    server.routes = {f"/{i}": answer(body=picture(i), after_s=0.3 if i % 10 == 0 else 0) for i in range(40)}
    urls = [f"http://h{i}.example/{i}" for i in range(41)]
    answers = list(fetch_urls(urls, QUICK, network=web.network))
    assert [a.image for a in answers] == [*map(picture, range(40)), b""]
    assert answers[40].reason == "http_404"


@pytest.mark.parametrize("kind", ["length", "chunks"])
def test_memory_is_bounded_while_the_first_is_slow(
    kind: str, web: Web, server: Server, noise_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from emu_ray.fetching.window import Window, WindowFull

    most_held, was_full = 0, False
    take = Window.take

    def watched(window: Window, row: int, count: int) -> None:
        nonlocal most_held, was_full
        try:
            take(window, row, count)
        except WindowFull:
            was_full = True
            raise
        most_held = max(most_held, window.held_bytes)

    async def slow(request: str, writer: asyncio.StreamWriter) -> None:
        while not was_full:  # however long the others take on this machine
            await asyncio.sleep(0.01)
        await answer(body=image)(request, writer)

    monkeypatch.setattr(Window, "take", watched)
    image = noise_picture(width_px=128, height_px=128)
    whole = answer(body=image) if kind == "length" else raw(head(Transfer_Encoding="chunked"), chunk(image), chunk(b""))
    server.routes = {f"/{i}": whole for i in range(60)}
    server.routes["/0"] = slow
    limits = dataclasses.replace(QUICK, window_bytes=100_000)
    urls = [f"http://h{i}.example/{i}" for i in range(60)]
    assert [a.reason for a in fetch_urls(urls, limits, network=web.network)] == [""] * 60
    assert 60 * len(image) > 5 * 100_000
    assert 100_000 - len(image) < most_held <= 100_000 + len(image)


def test_pictures_of_unknown_length_are_not_asked_for_again_and_again(
    web: Web, server: Server, noise_picture: Callable[..., bytes]
) -> None:
    image = noise_picture(width_px=128, height_px=128)
    chunks = [chunk(image[start : start + 4000]) for start in range(0, len(image), 4000)]
    pieces = [piece for each in chunks for piece in (each, 0.005)]
    server.routes = {f"/{i}": raw(head(Transfer_Encoding="chunked"), *pieces, chunk(b"")) for i in range(40)}
    server.routes["/0"] = answer(body=image, after_s=0.5)
    limits = dataclasses.replace(QUICK, window_bytes=100_000)
    urls = [f"http://h{i}.example/{i}" for i in range(40)]
    assert [a.reason for a in fetch_urls(urls, limits, network=web.network)] == [""] * 40
    assert len(server.requests) < 2 * 40


def test_waiting_for_a_look_up_is_not_on_a_request_s_clock(server: Server, picture: Callable[..., bytes]) -> None:
    class SlowNames(Web):
        def resolve(self, host: str) -> list[str]:
            time.sleep(0.3)
            return list(super().resolve(host))

    server.routes["/a.png"] = answer(body=picture())
    web = SlowNames(server.port)
    limits = dataclasses.replace(QUICK, dns_threads=1, timeout_s=1.2, connect_timeout_s=1.0)
    urls = [f"http://h{i}.example/a.png" for i in range(5)]
    assert [a.reason for a in fetch_urls(urls, limits, network=web.network)] == [""] * 5
    assert sorted(web.lookups) == [f"h{i}.example" for i in range(5)]


def test_a_deadline_ends_a_shard_and_closes_its_connections(
    web: Web, server: Server, picture: Callable[..., bytes]
) -> None:
    server.routes = {"/slow": raw(head(Content_Length=10_000), *drip(300)), "/a": answer(body=picture())}
    urls = ["http://slow.example/slow"] * 20 + ["http://h.example/a", "http://slow.example/a"]
    limits = dataclasses.replace(QUICK, shard_deadline_s=2)
    started = time.monotonic()
    assert [a.reason for a in fetch_urls(urls, limits, network=web.network)] == ["deadline"] * 20 + ["", "deadline"]
    assert time.monotonic() - started < 8
    until = time.monotonic() + 3
    while server.open_by_host["slow.example"] and time.monotonic() < until:
        time.sleep(0.05)
    assert not server.open_by_host["slow.example"]


def test_who_stops_listening_ends_the_fetching(web: Web, server: Server, picture: Callable[..., bytes]) -> None:
    server.routes = {"/a": answer(body=picture()), "/slow": answer(body=picture(), after_s=30)}
    answers = fetch_urls(["http://h.example/a", "http://i.example/slow"], QUICK, network=web.network)
    assert next(answers).reason == ""
    started = time.monotonic()
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 8
    assert not [thread for thread in threading.enumerate() if thread.name == "fetching"]


def test_nobody_at_the_port_is_a_failed_connection(picture: Callable[..., bytes]) -> None:
    from tests.s3_server import free_ports

    (got,) = fetch_urls([URL], QUICK, network=Web(free_ports(1)[0]).network)
    assert got.reason == "connection_failed"


def test_no_urls_give_no_answers_and_touch_nothing() -> None:
    def never(_: object) -> list[str]:
        raise AssertionError

    assert list(fetch_urls([], network=Network(resolve=never, open_socket=never))) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("has_tls", [False, True], ids=["none at all", "a certificate that nobody vouches for"])
def test_a_server_that_does_not_prove_who_it_is_gets_no_request(has_tls: bool, tmp_path: Path) -> None:
    context = certificate(tmp_path) if has_tls else None
    said: list[bytes] = []

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            try:
                secure = context.wrap_socket(connection, server_side=True) if context else connection
                said.append(secure.recv(9999))
                secure.sendall(head(400))
                secure.close()
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        web = Web(listening.getsockname()[1])
        (got,) = fetch_urls(["https://pictures.example/a.png"], QUICK, network=web.network)
        thread.join(10)
    assert got.reason == "tls_failed"
    assert not [words for words in said if b"GET" in words]


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's side, with a certificate for pictures.example that it signed itself."""
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subject = ["-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context


@pytest.mark.parametrize(
    "wrong",
    [{"connections": 0}, {"timeout_s": 0}, {"retries": -1}, {"window_bytes": 1}, {"user_agent": "a\r\nb: c"}, {"user_agent": ""}],
    ids=str,
)  # fmt: skip
def test_impossible_limits_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        FetchLimits(**wrong)  # type: ignore[arg-type]
