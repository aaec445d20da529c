"""The command itself, with URLs that are all refused: no packet leaves this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu_ray.stations import Station

pytestmark = pytest.mark.slow  # most start Ray
REPOSITORY = Path(__file__).resolve().parents[2]


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    whole = [sys.executable, "-m", "jobs.fetch", *argv]
    return subprocess.run(whole, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


def test_the_help_tells_what_to_give() -> None:
    said = " ".join(command("urls", "--help").stdout.replace("│", " ").split())
    for field, told in {
        "--source STR": "a list of URLs, or a folder of lists, local or s3://",
        "--placeholders {None}|STR": "a file of sha256 digests, one a line, of pictures that stand for missing ones; none ships",
        "--stop-without-network, --no-stop-without-network": "end the run at a shard in which all URLs",
        "--limits.timeout-s FLOAT": "of a request, once its host is looked up",
    }.items():
        assert f"{field} {told}" in said


def test_a_list_without_urls_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("link,caption\nhttp://127.0.0.1/,a\n")
    ended = command("urls", "--source", str(tmp_path / "list.csv"), "--root", str(tmp_path))
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "list.csv: expected a column of URLs (url, URL, image_url), found link, caption" in ended.stderr


def test_refused_urls_become_rows_with_reasons_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption\nhttp://127.0.0.1/,a\nfile:///etc/passwd,b\nhttp://10.0.0.1/,c\n")
    argv = ("urls", "--source", str(tmp_path / "list.csv"), "--root", str(tmp_path))
    ended = command(*argv)
    assert ended.returncode == 0, ended.stderr
    assert "pool: 3 URLs, 0 fetched; not fetched: scheme_not_allowed 1, address_not_public 2; " in ended.stdout
    assert Station(f"{tmp_path}/pool").require("pool").rows == 3
    again = command(*argv)
    assert again.returncode == 0 and "nothing to do" in again.stdout
