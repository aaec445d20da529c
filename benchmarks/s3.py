"""What stations cost on S3 over a bare client, against a real server on loopback.

python -m benchmarks.s3 [--quick]. Both sides move the same bytes to and from the same SeaweedFS, one after the other, in turn.
The last line is JSON; above 1 is better:
vs_boto3_write   CPU-seconds of boto3's put_object of ready Parquet files over `Station.write_table` of the same tables;
                 both encode the Parquet
vs_boto3_read    CPU-seconds of boto3's get_object and a Parquet read over `read_slice` of all slices
commit_ms        how long `Station.finish`'s conditional put and its checks take at p50, with one part
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Station
from emu_ray.stations.slices import cut, read_slice
from tests.s3_server import BUCKET, S3Server, running_s3

PICTURE_BYTES = 100_000
COLUMNS = ["key", "image", "caption"]


def main(quick: bool) -> None:
    """Measure and print the ratios."""
    parts, rows, rounds = (4, 100, 3) if quick else (12, 200, 5)
    tables = [_table(part, rows) for part in range(parts)]
    with (
        tempfile.TemporaryDirectory(prefix="emu_ray-s3-") as folder,
        running_s3(Path(folder), max_volumes=100) as server,
    ):
        os.environ.update(server.environment)
        client = _client(server)
        write: list[float] = []
        read: list[float] = []
        for number in range(rounds):
            station = Station(f"{server.uri}/ours-{number}/pool")
            station.begin("recipe", "{}", "pool", {})
            ours = _cpu_s(lambda to=station: _write(to, tables))
            theirs = _cpu_s(lambda at=number: _put(client, f"theirs-{at}", tables))
            write.append(theirs / ours)
            ours = _cpu_s(lambda of=station: _read(of, parts))
            theirs = _cpu_s(lambda at=number: _get(client, f"theirs-{at}", parts))
            read.append(theirs / ours)
            print(f"round {number + 1}: write {write[-1]:.2f}, read {read[-1]:.2f}", flush=True)
        commits = [_commit_s(f"{server.uri}/commit-{number}/pool", tables[0].slice(0, 1)) for number in range(20)]
    told = {
        "vs_boto3_write": round(statistics.median(write), 2),
        "vs_boto3_read": round(statistics.median(read), 2),
        "commit_ms": round(1e3 * statistics.median(commits), 1),
    }
    print(json.dumps(told))


def _table(part: int, rows: int) -> pa.Table:
    rng = np.random.default_rng(part)
    pairs = [Pair(image=rng.bytes(PICTURE_BYTES), caption="a picture", address=f"{part}/{n}") for n in range(rows)]
    return pa.concat_tables(pool_tables(pairs, Caps()))


def _client(server: S3Server):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"], region_name="us-east-1")


def _write(station: Station, tables: list[pa.Table]) -> None:
    for number, table in enumerate(tables):
        station.write_table(f"part-{number:05d}.parquet", table)
    station.finish(rows=sum(map(len, tables)))


def _put(client, prefix: str, tables: list[pa.Table]) -> None:  # type: ignore[no-untyped-def]
    for number, table in enumerate(tables):
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{number}", Body=stream.getvalue())


def _read(station: Station, parts: int) -> None:
    names = [f"part-{number:05d}.parquet" for number in range(parts)]
    rows = sum(len(read_slice(station, each, COLUMNS)) for each in cut(station, names, rows_per_slice=1000))
    assert rows == station.require().rows


def _get(client, prefix: str, parts: int) -> None:  # type: ignore[no-untyped-def]
    for number in range(parts):
        body = client.get_object(Bucket=BUCKET, Key=f"{prefix}/{number}")["Body"].read()
        assert len(pq.read_table(pa.BufferReader(body), columns=COLUMNS))


def _commit_s(uri: str, table: pa.Table) -> float:
    station = Station(uri)
    station.begin("recipe", "{}", "pool", {})
    station.write_table("part-00000.parquet", table)
    started = time.perf_counter()
    station.finish(rows=len(table))
    return time.perf_counter() - started


def _cpu_s(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
