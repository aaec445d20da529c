"""Our side of each comparison of `benchmarks.curation`, one process each: python -m benchmarks.curation_sides NAME WHERE.

One thread, no Ray: what is compared is the work on a picture. The last line says how many pictures came through and in what CPU time.
"""

from __future__ import annotations

import csv
import hashlib
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
from PIL import Image

from benchmarks.peers import cpu_clock
from emu_ray.curation.pair_scorer import HardFloors
from emu_ray.curation.perceptual_hash import perceptual_hash
from emu_ray.curation.photography import photography
from emu_ray.fetching.fetch import fetch_urls
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network
from emu_ray.ingest.pairs import Caps, Pair, header_size, pool_tables
from emu_ray.pictures.decode import decode
from emu_ray.stations import Station

MAX_PIXELS = 64_000_000


def _files(folder: str) -> Iterator[bytes]:
    for path in sorted(Path(folder).glob("*.jpg")):
        yield path.read_bytes()


def shape_aspect_hash(folder: str, side_px: int | None = None) -> int:
    """Size and aspect from the header, duplicates by perceptual hash."""
    floors = HardFloors(min_short_side_px=256, max_aspect=2.0)
    seen: set[str] = set()
    for image in _files(folder):
        if not floors.before_decoding(*header_size(image, MAX_PIXELS), "a picture"):
            pixels = decode(image, side_px=side_px).pixels
            if pixels is not None:
                seen.add(perceptual_hash(pixels))
    return len(seen)


def decode_resize(folder: str, side_px: int | None = None) -> int:
    """Decoded and resized to 224 x 224."""
    done = 0
    for image in _files(folder):
        pixels = decode(image, side_px=side_px).pixels
        if pixels is not None:
            done += Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR).size == (224, 224)
    return done


def checks(folder: str, side_px: int | None = None) -> int:
    """Photography scores, a perceptual hash and a digest of each picture."""
    done = 0
    for image in _files(folder):
        pixels = decode(image, side_px=side_px).pixels
        if pixels is not None:
            photography(pixels)
            perceptual_hash(pixels)
            hashlib.blake2b(image, digest_size=8).hexdigest()
            done += 1
    return done


class _Loopback(socket.socket):
    port = 0

    def connect(self, address: Any) -> None:
        super().connect(("127.0.0.1", self.port))


def fetch_verify(lists: str) -> int:
    """The URLs of a CSV fetched with every guard on, each picture decoded in full to verify it, and a pool written."""
    with open(lists, newline="") as file:
        urls = [row["url"] for row in csv.DictReader(file)]
    port = urlsplit(urls[0]).port or 80

    def dial(info: Any) -> socket.socket:
        opened = _Loopback(info[0], info[1], info[2])
        opened.port = port
        return opened

    public = [url.replace("127.0.0.1", "pictures.example") for url in urls]
    network = Network(resolve=lambda host: ["93.184.216.34"], open_socket=dial)  # the guard refuses loopback itself
    limits = FetchLimits(allowed_ports=(port,), connections=16, connections_per_host=16)
    answers = fetch_urls(public, limits, network=network)
    found = [answer for answer in answers if not answer.reason and decode(answer.image).pixels is not None]
    pairs = (Pair(image=a.image, caption="a picture", address=str(number)) for number, a in enumerate(found))
    with tempfile.TemporaryDirectory() as folder:
        for number, table in enumerate(pool_tables(pairs, Caps())):
            Station(folder).write_table(f"part-{number:05d}.parquet", table)
    return len(found)


SIDES: dict[str, Callable[[str], int]] = {
    "shape_aspect_hash": shape_aspect_hash,
    "shape_aspect_hash_shrunk": partial(shape_aspect_hash, side_px=256),
    "decode_resize": decode_resize,
    "decode_resize_shrunk": partial(decode_resize, side_px=224),
    "checks": checks,
    "checks_shrunk": partial(checks, side_px=384),
    "fetch_verify": fetch_verify,
}

if __name__ == "__main__":
    cv2.setNumThreads(1)
    started = cpu_clock.now()
    cpu_clock.tell(SIDES[sys.argv[1]](sys.argv[2]), started)
