"""The pool from a list of URLs: from end to end on a real local Ray, against a server on loopback."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_ray.config import fingerprint
from emu_ray.errors import InputError, RecipeError, StationConflictError, StationError, find_in_chain
from emu_ray.fetching.limits import FetchLimits
from emu_ray.fetching.on_ray import FAULTS, FetchRecipe, fetch, read_placeholders, tables_of_urls
from emu_ray.fetching.url_list import list_urls
from emu_ray.stations import Station
from tests.fetching.loopback import Server, Web, answer
from tests.s3_server import free_ports

LIMITS = FetchLimits(retries=0)


@pytest.fixture
def list_of_30(server: Server, picture: Callable[..., bytes], tmp_path: Path) -> Path:
    """30 URLs, of which every tenth isn't there, one is refused, one opts out, and one is a placeholder."""
    server.routes = {f"/{i}.png": answer(body=picture(i, width_px=8 + i)) for i in range(30) if i % 10 != 9}
    server.routes["/3.png"] = answer(body=picture(3), X_Robots_Tag="noai")
    rows = [
        {"url": f"http://h{i % 7}.example/{i}.png", "caption": f"picture {i}", "similarity": i / 100, "nothing": None}
        for i in range(30)
    ]
    rows[5]["url"] = "http://169.254.169.254/latest"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    (tmp_path / "placeholders.txt").write_text(
        f"# of a well-known host\n\n{hashlib.sha256(picture(7, width_px=15)).hexdigest().upper()} # gone\n"
    )
    return tmp_path / "list.parquet"


def recipe_for(path: Path, root: Path, **fields: Any) -> FetchRecipe:
    return FetchRecipe(
        root=str(root),
        source=str(path),
        limits=LIMITS,
        **{"placeholders": str(path.parent / "placeholders.txt"), "urls_per_shard": 7, "shards_per_wave": 3, **fields},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_every_url_becomes_a_row_and_a_second_run_has_nothing_to_do(
    list_of_30: Path, web: Web, server: Server, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    recipe = recipe_for(list_of_30, tmp_path)
    manifest = fetch(recipe, web.network)
    reasons = {9: "http_404", 19: "http_404", 29: "http_404", 3: "opted_out", 5: "address_not_public", 7: "placeholder"}
    failures = Counter(reasons.values())
    assert {n: c for n, c in manifest.counts.items() if n.startswith("fetch_")} == {
        f"fetch_{reason}": count for reason, count in failures.items()
    }
    assert manifest.counts["rows"] == 30 and manifest.counts["empty_image"] == 6
    pool = Station(f"{tmp_path}/pool").read_table()
    assert pool["fetch_error"].to_pylist() == [reasons.get(i, "") for i in range(30)]
    assert pool["image"].to_pylist() == [b"" if i in reasons else picture(i, width_px=8 + i) for i in range(30)]
    assert pool["width_px"].to_pylist() == [None if i in reasons else 8 + i for i in range(30)]
    assert pool["caption"].to_pylist() == [f"picture {i}" for i in range(30)]
    assert [json.loads(text) for text in pool["extra"].to_pylist()] == [{"similarity": i / 100} for i in range(30)]
    assert pool["source"].to_pylist()[4:6] == ["http://h4.example/4.png", "http://169.254.169.254/latest"]
    assert len(set(pool["key"].to_pylist())) == 30
    asked = len(server.requests)
    assert fetch(recipe, web.network) == manifest
    assert len(server.requests) == asked == 29

    (list_of_30.parent / "placeholders.txt").write_text("0" * 64)
    with pytest.raises(StationConflictError):
        fetch(recipe, web.network)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_worker_without_network_ends_the_run_and_a_rerun_repeats_only_its_wave(
    list_of_30: Path, web: Web, server: Server, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    lines = [("url", "caption"), *((f"http://h{i}.example/{i % 3}.png", str(i)) for i in range(180))]
    path = tmp_path / "list.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    recipe = recipe_for(path, tmp_path, urls_per_shard=60, shards_per_wave=1)
    nobody = Web(free_ports(1)[0])
    with pytest.raises(Exception) as raised:
        fetch(recipe, nobody.network)
    said = find_in_chain(raised.value)
    assert isinstance(said, InputError)
    assert "no URL of list.csv, rows 0 to 60, could be reached (connection_failed 60)" in str(said)
    assert not server.requests and not list((tmp_path / "pool").glob("**/_manifest.json"))
    assert fetch(recipe, web.network).rows == 180
    assert len(server.requests) == 180


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_network_that_dies_after_the_first_urls_ends_the_run_and_the_same_command_ends_the_work(
    web: Web, server: Server, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    server.routes["/a.png"] = answer(body=picture())
    hosts = ["alive" if i < 600 else "mortal" for i in range(1200)]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["url", *(f"http://{host}.example/a.png" for host in hosts)]))
    recipe = recipe_for(path, tmp_path, urls_per_shard=600, shards_per_wave=1, max_error_share=1.0, placeholders=None)
    recipe = dataclasses.replace(recipe, stop_without_network=False)
    dead = Web(web.port, {"mortal.example": []}).network
    with pytest.raises(StationError, match="wave 2 of 2.* failed for the network's sake jumped from 0.0% to 100.0%"):
        fetch(recipe, dead)
    with pytest.raises(StationError, match=r"600 of 600 rows failed for .*, at most 50% are allowed \(--max-error-share\)"):  # fmt: skip
        fetch(dataclasses.replace(recipe, max_error_share=0.5), dead)
    assert [Station(f"{tmp_path}/pool").wave(n).is_finished() for n in range(2)] == [True, False]
    manifest = fetch(recipe, web.network)
    assert manifest.rows == 1200 and not [name for name in manifest.counts if name.startswith("fetch_")]


def test_what_a_dead_network_gives_counts_as_a_fault_and_what_a_server_says_does_not() -> None:
    faults = ("dns_failure", "connection_failed", "timeout", "tls_failed", "deadline")
    assert FAULTS.counts == tuple(f"fetch_{reason}" for reason in faults)


def test_how_a_list_is_dealt_to_tasks_and_watched_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "list.csv", tmp_path)
    paces = {"shards_per_wave": 9, "cpus_per_task": 0.1, "max_error_share": 0.9, "max_error_jump": 0.9}
    assert fingerprint(dataclasses.replace(recipe, **paces)) == fingerprint(recipe)
    with pytest.raises(RecipeError, match="cpus_per_task"):
        dataclasses.replace(recipe, cpus_per_task=0)


@pytest.mark.parametrize(("urls", "good", "refused", "ends"), [(50, 0, 0, True), (50, 0, 30, True), (49, 0, 30, False), (50, 1, 0, False)])  # fmt: skip
def test_only_a_network_that_reaches_nothing_is_called_broken(
    urls: int, good: int, refused: int, ends: bool, server: Server, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    class HalfDead(Web):
        def resolve(self, host: str) -> list[str]:
            if host.startswith("dead"):
                raise OSError("no such name")
            return list(super().resolve(host))

    server.routes["/a.png"] = answer(404)
    listed = [f"http://dead{i}.example/" for i in range(urls)] + ["http://good.example/a.png"] * good
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["url", *listed, *["ftp://refused.example/"] * refused]))
    (shard,) = list_urls(str(path)).shards
    recipe = FetchRecipe(root=str(tmp_path), source=str(path), limits=LIMITS)
    network = HalfDead(server.port).network

    def rows(recipe: FetchRecipe) -> int:
        return sum(map(len, tables_of_urls(shard, recipe, network=network)))

    if ends:
        with pytest.raises(InputError, match="network or resolver seems broken"):
            rows(recipe)
    assert rows(dataclasses.replace(recipe, stop_without_network=not ends)) == urls + good + refused


def test_the_same_answers_give_the_same_tables(list_of_30: Path, web: Web, tmp_path: Path) -> None:
    recipe = recipe_for(list_of_30, tmp_path)
    shards = list_urls(str(list_of_30), urls_per_shard=7).shards

    def tables() -> pa.Table:
        return pa.concat_tables(table for s in shards for table in tables_of_urls(s, recipe, network=web.network))

    assert tables().equals(tables())


def test_a_line_of_the_placeholders_that_is_no_digest_is_named(tmp_path: Path) -> None:
    assert read_placeholders(None) == frozenset()
    path = tmp_path / "digests.txt"
    path.write_text("# fine\n" + "a" * 64 + "\nnot one\n")
    with pytest.raises(InputError, match="digests.txt, line 3: expected a sha256 of 64 hex digits, found 'not one'"):
        read_placeholders(str(path))
    with pytest.raises(InputError, match="can't read the placeholders"):
        read_placeholders(str(tmp_path / "nowhere"))
