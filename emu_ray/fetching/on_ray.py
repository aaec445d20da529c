"""Writes the `pool` station from lists of URLs: one Ray task a shard, wave after wave, as `ingest` does.

Limits are a task's: a cluster that runs n tasks at once asks one host at most n times `connections_per_host` times at
once. Ray runs as many tasks as it has CPUs; lists as published are in no order of hosts, which spreads them well.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from emu_ray.config import absolute, require_at_least
from emu_ray.errors import InputError
from emu_ray.fetching.addresses import MAX_URL_CHARS
from emu_ray.fetching.fetch import fetch_urls
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network
from emu_ray.fetching.reasons import NETWORK, REFUSED_URL
from emu_ray.fetching.url_list import UrlColumns, UrlShard, list_urls, read_rows
from emu_ray.ingest.on_ray import ingest_tables
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Manifest, Station, open_filesystem

ENOUGH_TO_TELL = 50  # URLs that all fail for the network's sake: it is the worker's network, not theirs


@dataclass(frozen=True, kw_only=True)
class FetchRecipe:
    """Which URLs to fetch and how gently."""

    root: str  # the pool is written to ROOT/pool
    source: str = field(metadata={"affects_result": False})  # names and sizes of the lists count, not where they lie
    columns: UrlColumns = UrlColumns()
    limits: FetchLimits = FetchLimits()
    placeholders: str | None = field(default=None, metadata={"affects_result": False})  # its digests count
    urls_per_shard: int = 2000
    rows_per_file: int = 10_000
    shards_per_wave: int = 64
    stop_without_network: bool = field(default=True, metadata={"affects_result": False})
    # a shard in which at least 50 URLs failed, all for the network's sake, ends the run instead of becoming rows

    def __post_init__(self) -> None:
        require_at_least(self, 1, "urls_per_shard", "rows_per_file", "shards_per_wave")


def fetch(recipe: FetchRecipe, network: Network | None = None) -> Manifest:
    """Write ROOT/pool from the lists in `recipe.source`, or only the waves that are missing, and return its manifest.

    Each URL becomes a row: with the bytes as they were served, or with none and a reason in `fetch_error`. Raises
    InputError for a source without lists, a list without a column of URLs and a worker whose network is broken. `network` is for tests; it must pickle.
    """
    source = absolute(recipe.source, "--source")
    listing = list_urls(source, recipe.columns, recipe.urls_per_shard)
    placeholders = read_placeholders(recipe.placeholders)
    inputs = {"source": listing.fingerprint}
    if placeholders:
        inputs["placeholders"] = hashlib.sha256("\n".join(sorted(placeholders)).encode()).hexdigest()[:16]
    return ingest_tables(
        Station(f"{recipe.root.rstrip('/')}/pool"),
        recipe,
        listing.shards,
        functools.partial(tables_of_urls, recipe=recipe, placeholders=placeholders, network=network),
        inputs=inputs,
        shards_per_wave=recipe.shards_per_wave,
        rows_per_file=recipe.rows_per_file,
    )


def tables_of_urls(
    shard: UrlShard, recipe: FetchRecipe, placeholders: frozenset[str] = frozenset(), network: Network | None = None
) -> Iterator[pa.Table]:
    """The `pool` tables of one shard; runs on a worker."""
    limits = recipe.limits
    caps = Caps(max_image_bytes=limits.max_image_bytes, max_image_pixels=limits.max_image_pixels)
    return pool_tables(_pairs(shard, recipe, placeholders, network), caps)


def read_placeholders(path: str | None) -> frozenset[str]:
    """The sha256 digests in a text file, one a line, `#` begins a comment; InputError names a line that is none."""
    if path is None:
        return frozenset()
    system, local = open_filesystem(absolute(path, "--placeholders"))
    try:
        with system.open_input_stream(local) as stream:
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"can't read the placeholders {path}: {str(error).splitlines()[0]}") from error
    digests = [line.partition("#")[0].strip().lower() for line in lines]
    for number, digest in enumerate(digests, 1):
        if digest and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise InputError(f"{path}, line {number}: expected a sha256 of 64 hex digits, found {digest[:80]!r}")
    return frozenset(filter(None, digests))


def _pairs(
    shard: UrlShard, recipe: FetchRecipe, placeholders: frozenset[str], network: Network | None
) -> Iterator[Pair]:
    rows = list(read_rows(shard, recipe.columns))
    answers = fetch_urls([row.url for row in rows], recipe.limits, placeholders=placeholders, network=network)
    reasons: Counter[str] = Counter()
    for row, answer in zip(rows, answers, strict=True):
        reasons[answer.reason] += 1
        yield Pair(
            image=answer.image,
            caption=row.caption,
            address=row.address,
            likes=row.likes,
            source=_as_listed(row.url),
            fetch_error=answer.reason,
            extra=row.extra,
        )
    if recipe.stop_without_network:
        _require_network(reasons, shard)


def _require_network(reasons: Counter[str], shard: UrlShard) -> None:
    """InputError when nothing that went to the network came back from it."""
    failed = sum(reasons[reason] for reason in NETWORK)
    silent = failed + reasons["deadline"] + sum(reasons[reason] for reason in REFUSED_URL)
    if failed >= ENOUGH_TO_TELL and silent == sum(reasons.values()):
        found = ", ".join(f"{reason} {reasons[reason]}" for reason in NETWORK if reasons[reason])
        raise InputError(
            f"no URL of {shard.name}, rows {shard.first_row} to {shard.first_row + shard.rows}, could be reached "
            f"({found}): the worker's network or resolver seems broken; mend it and run the same command again, "
            "or take these as the URLs' own failures with --no-stop-without-network"
        )


def _as_listed(url: object) -> str | None:
    return url[:MAX_URL_CHARS].encode("utf-8", "replace").decode() if isinstance(url, str) else None
