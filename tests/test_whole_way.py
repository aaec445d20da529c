"""The whole way on real pictures, and the bookkeeping that makes a second run short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emu_ray import whole_way
from emu_ray.generation.samples import from_png
from emu_ray.stations import Station
from emu_ray.stations.folders import base_folder
from emu_ray.whole_way import MemoryWatch, Record, Step, run_steps

ROOT = Path(__file__).resolve().parents[1]


def one_step(station: str) -> Step:
    return Step(job=station, arguments=("demo",), writes=(station,))


def write(root: Path, station: str, mark: str = "a") -> None:
    place = Station(f"{root}/{station}")
    place.begin(mark, "{}", "thing", {})
    place.put_file("content", b"x")
    place.finish()


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"1")
    return str(tmp_path / "base")


def test_a_second_run_starts_nothing(tmp_path: Path, base: str) -> None:
    steps, root = [one_step("first"), one_step("second")], tmp_path / "run"
    assert run_steps(steps, Record.read(str(root)), base, lambda s: write(root, s.job), lambda _: None) == 2
    assert run_steps(steps, Record.read(str(root)), base, lambda s: pytest.fail(s.job), lambda _: None) == 0


def test_a_removed_station_runs_its_step_and_all_after_it(tmp_path: Path, base: str) -> None:
    steps, root = [one_step(name) for name in ("first", "second", "third")], tmp_path / "run"
    run_steps(steps, Record.read(str(root)), base, lambda s: write(root, s.job), lambda _: None)
    for file in (root / "second").iterdir():
        file.unlink()
    ran: list[str] = []

    def again(step: Step) -> None:
        ran.append(step.job)
        if step.job == "second":
            write(root, "second")

    run_steps(steps, Record.read(str(root)), base, again, lambda _: None)
    assert ran == ["second", "third"]


def test_a_step_that_had_nothing_to_do_keeps_its_seconds_and_those_after_it_are_skipped(
    tmp_path: Path, base: str
) -> None:
    root, ran = tmp_path / "run", []
    outside = Step(job="first", arguments=("folder", "--source", "pictures"), writes=("first",))
    steps = [outside, one_step("second")]
    run_steps(steps, Record.read(str(root)), base, lambda s: write(root, s.job), lambda _: None)
    record = Record.read(str(root))
    record.steps["first"]["seconds"] = 77.0
    record.write()
    run_steps(steps, Record.read(str(root)), base, lambda s: ran.append(s.job), lambda _: None)
    assert ran == ["first"], "the user's files may have changed, and nothing else"
    assert Record.read(str(root)).steps["first"]["seconds"] == 77.0


def test_other_code_lets_every_job_judge_for_itself(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, ran = tmp_path / "run", []
    run_steps([one_step("first")], Record.read(str(root)), base, lambda s: write(root, s.job), lambda _: None)
    monkeypatch.setattr(whole_way, "code_fingerprint", lambda: "another")
    run_steps([one_step("first")], Record.read(str(root)), base, lambda s: ran.append(s.job), lambda _: None)
    assert ran == ["first"]


def test_another_base_runs_everything_again(tmp_path: Path, base: str) -> None:
    root = tmp_path / "run"
    run_steps([one_step("first")], Record.read(str(root)), base, lambda s: write(root, s.job), lambda _: None)
    (tmp_path / "base" / "weights").write_bytes(b"2")
    ran: list[str] = []
    run_steps([one_step("first")], Record.read(str(root)), base, lambda s: ran.append(s.job), lambda _: None)
    assert ran == ["first"]


def test_the_memory_of_a_child_is_counted() -> None:
    with MemoryWatch() as watch:
        held = "x = bytearray(300_000_000); import time; time.sleep(4)"
        subprocess.run([sys.executable, "-c", held], check=True)
    assert watch.peak_gb > 0.3


@pytest.mark.slow
def test_the_stamps_go_the_whole_way_to_pictures(stamps: Path, tmp_path: Path) -> None:
    if not (base_folder() / "unet").exists():
        pytest.skip(f"no base in {base_folder()}: run `make base`")
    root = tmp_path / "stamps"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [
        sys.executable,
        "-m",
        "jobs.whole_way",
        "stamps",
        "--root",
        str(root),
        "--dashboard-port",
        "18265",
        "--source",
        str(stamps),
    ]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    tuned = Station(f"{root}/samples/tuned").read_table()
    images = from_png(tuned["image"].to_pylist())
    assert images.shape == (16, 64, 64, 3)
    assert images.std(axis=(1, 2, 3)).min() > 5, "a picture is one flat colour"
    assert np.abs(images.astype(int) - images[0]).mean(axis=(1, 2, 3))[1:].min() > 1, "two prompts gave one picture"
    assert Station(f"{root}/checkpoints/tuned").require().extra["stop_reason"]
