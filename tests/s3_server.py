"""A real S3 server on loopback (SeaweedFS), for tests and benchmarks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "emu-test"


@dataclass(frozen=True)
class S3Server:
    """A bucket of a server on loopback; `environment` is what a process needs to reach it."""

    bucket: str
    environment: dict[str, str]

    @property
    def uri(self) -> str:
        """s3:// address of the bucket."""
        return f"s3://{self.bucket}"


def weed_program() -> Path:
    """Where pip puts SeaweedFS, whether it is there or not."""
    return Path(sys.executable).parent / "weed"


@contextmanager
def running_s3(folder: Path, max_volumes: int = 20) -> Iterator[S3Server]:
    """SeaweedFS on free ports of 127.0.0.1 with one bucket of at most `max_volumes` x 64 MB in `folder`, ended by its id."""
    config = folder / "s3.json"
    credentials = [{"accessKey": "emu", "secretKey": "emu-secret"}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    config.write_text(json.dumps({"identities": [{"name": "emu", "credentials": credentials, "actions": actions}]}))
    ports = free_ports(8)
    names = ("master", "volume", "filer", "s3")
    flags = [f"-{n}.port={ports[i]}" for i, n in enumerate(names)]
    flags += [f"-{n}.port.grpc={ports[4 + i]}" for i, n in enumerate(names)]
    log = open(folder / "weed.log", "wb")
    server = subprocess.Popen(
        [
            str(weed_program()),
            "server",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            f"-s3.config={config}",
            f"-volume.max={max_volumes}",
            "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",  # else port 9101, which another test run, or Ray's proxy, may hold
            "-s3.autoCreateBucket=false",
            *flags,
        ],
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd=folder,
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[3]}",
        "AWS_ACCESS_KEY_ID": "emu",
        "AWS_SECRET_ACCESS_KEY": "emu-secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        _make_bucket(BUCKET, environment, folder / "weed.log")
        yield S3Server(BUCKET, environment)
    finally:
        os.kill(server.pid, signal.SIGKILL)  # it would take 10 s to end in peace, and keeps nothing
        server.wait(10)
        log.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _make_bucket(name: str, environment: dict[str, str], log: Path, timeout_s: float = 40) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
        config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
    )
    until = time.monotonic() + timeout_s
    while True:
        try:
            client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key="ready", Body=b"")
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > until:
                tail = log.read_text(errors="replace")[-2000:]
                raise TimeoutError(f"the S3 server did not answer in {timeout_s} s:\n{tail}") from None
            time.sleep(0.3)
