"""Writes the `pool` station from lists of URLs: one Ray task a shard, wave after wave, as `ingest` does.

Limits are a task's: a cluster that runs n tasks at once asks one host at most n times `connections_per_host` times at
once. Ray runs a task for each `cpus_per_task` that it has; lists as published are in no order of hosts, which spreads
them well.
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
from emu_ray.error_watch import ErrorWatch, Faults
from emu_ray.errors import InputError, first_line
from emu_ray.fetching.addresses import MAX_URL_CHARS
from emu_ray.fetching.fetch import fetch_urls
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.network import Network
from emu_ray.fetching.reasons import NETWORK, REFUSED_URL
from emu_ray.fetching.url_list import UrlColumns, UrlShard, list_urls, read_rows
from emu_ray.ingest.on_ray import WaveSettings, ingest_tables
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Manifest, Station, open_filesystem

ENOUGH_TO_TELL = 50  # URLs that all fail for the network's sake: it is the worker's network, not theirs
FAULTS = Faults(
    counts=tuple(f"fetch_{reason}" for reason in (*NETWORK, "deadline")),
    said="failed for the network's sake",
    look_at="the workers' network and resolver, or limits.shard_deadline_s",
)


@dataclass(frozen=True, kw_only=True)
class FetchRecipe:
    """Which URLs to fetch and how gently.

    Of the lists their names and sizes count, of the placeholders their digests, not where they lie.
    """

    root: str  # the pool is written to ROOT/pool
    source: str = field(metadata={"affects_result": False})  # a list of URLs, or a folder of lists, local or s3://
    columns: UrlColumns = UrlColumns()
    limits: FetchLimits = FetchLimits()
    # a file of sha256 digests, one a line, of pictures that stand for missing ones; none ships with emu_ray
    placeholders: str | None = field(default=None, metadata={"affects_result": False})
    urls_per_shard: int = 2000  # that a task fetches
    rows_per_file: int = 10_000  # of the pool, at most
    # what a kill may cost, and the most tasks at once; to be kept until the pool is finished
    shards_per_wave: int = field(default=1024, metadata={"affects_result": False})
    # below 1: a task mostly waits; it may hold 0.4 GB
    cpus_per_task: float = field(default=0.5, metadata={"affects_result": False})
    # end the run at a shard in which all URLs, at least 50, fail for the network's sake, instead of writing them as rows
    stop_without_network: bool = field(default=True, metadata={"affects_result": False})
    # share of a wave's URLs, and of a shard's, that fail for the network's sake or its deadline; more ends the run
    max_error_share: float = field(default=0.5, metadata={"affects_result": False})
    # the same, above the share of all waves before
    max_error_jump: float = field(default=0.25, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "urls_per_shard", "rows_per_file", "shards_per_wave")
        require_at_least(self, 0.01, "cpus_per_task")


def fetch(recipe: FetchRecipe, network: Network | None = None) -> Manifest:
    """Write ROOT/pool from the lists in `recipe.source`, or only the waves that are missing, and return its manifest.

    Each URL becomes a row: with the bytes as they were served, or with none and a reason in `fetch_error`. Raises
    InputError for a source without lists, a list without a column of URLs and a worker whose network is broken, and
    StationError when too many URLs fail for the network's sake. `network` is for tests; it must pickle.
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
        inputs,
        WaveSettings(
            shards_per_wave=recipe.shards_per_wave,
            rows_per_file=recipe.rows_per_file,
            cpus_per_task=recipe.cpus_per_task,
            watch_after=functools.partial(
                ErrorWatch.before, max_share=recipe.max_error_share, max_jump=recipe.max_error_jump, faults=FAULTS
            ),
        ),
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
        raise InputError(f"can't read the placeholders {path}: {first_line(error)}") from error
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
