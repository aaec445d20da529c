"""The command itself: exit codes and sentences."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emu_ray.stations import Station

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    whole = [sys.executable, "-m", "jobs.ingest", *argv]
    return subprocess.run(whole, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("stmaps",), "unknown recipe 'stmaps'"),
        (("folder", "--sauce", "x"), "unknown field '--sauce'"),
        (("folder", "--source", "/nowhere/at/all"), "/nowhere/at/all doesn't exist"),
    ],
)
def test_a_mistake_exits_with_2_and_one_sentence(argv: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ended = command(*argv) if len(argv) == 1 else command(*argv, "--root", str(tmp_path))
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and said in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_broken_tar_exits_with_2_and_names_it_although_it_failed_on_a_worker(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"broken" * 1000)
    ended = command("folder", "--source", str(tmp_path / "a.tar"), "--root", str(tmp_path / "runs"))
    assert ended.returncode == 2, ended.stderr
    assert f"error: can't read {tmp_path}/a.tar as a tar" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_from_s3_to_s3_gives_every_stamp_and_a_second_run_nothing_to_do(s3: Any, stamps: Path, tmp_path: Path) -> None:
    for tar in ("stamps-000.tar", "stamps-001.tar"):
        Station(f"{s3.uri}/in").put_file(tar, stamps / tar)
    argv = ("folder", "--source", f"{s3.uri}/in", "--root", f"{s3.uri}/{tmp_path.name}", "--shards-per-wave", "1")
    ended = command(*argv)
    assert ended.returncode == 0, ended.stderr
    pool = Station(f"{s3.uri}/{tmp_path.name}/pool")
    assert pool.require("pool").rows == 200 and pool.read_table(["width_px"])["width_px"].null_count == 0
    again = command(*argv)
    assert again.returncode == 0 and "nothing to do" in again.stdout and "Ray" not in again.stderr
