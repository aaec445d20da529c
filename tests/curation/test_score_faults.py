"""Kills at random moments, then the same command: every pair has one row, bit-identical to an undisturbed run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from emu_ray.curation.on_ray import FAULTS, ScoreRecipe, score
from emu_ray.curation.pair_scorer import HardFloors
from emu_ray.error_watch import ErrorWatch
from emu_ray.errors import StationError
from emu_ray.stations import Station
from tests.curation.fragile_decoder import ENDLESS, POISON, fragile_decode
from tests.curation.score_process import TWO_NODES, end_all, start_scoring
from tests.curation.small_pool import pairs_of, small_recipe, write_pool


def column_digests(root: Path) -> dict[str, str]:
    """Column -> digest of its values to the last bit, in order of the keys; what lies below a null doesn't count."""
    table = Station(root / "scores").read_table()
    return {n: hashlib.sha256(pickle.dumps(table[n].to_pylist())).hexdigest() for n in table.column_names}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_a_picture_that_crashes_the_decoder_gets_a_reason_and_nothing_else_is_lost(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes]
) -> None:
    images = [noise_picture(n, 48, 48) for n in range(20)]
    write_pool(tmp_path / "whole", pairs_of(images), files=1)
    score(small_recipe(tmp_path / "whole", untrained))
    images[5], images[9], images[17] = POISON, ENDLESS, POISON
    write_pool(tmp_path / "poisoned", pairs_of(images), files=1)
    impatient = small_recipe(tmp_path / "poisoned", untrained, max_slice_s=8, max_decode_s=2)
    manifest = score(impatient, fragile_decode)
    assert manifest.counts == {"rows": 20, "measured": 17, "gate_crashed_decoder": 3}
    errors = Station(tmp_path / "poisoned" / "scores").read_table(["decode_error"])["decode_error"].to_pylist()
    assert sum("the decoder crashed with exit code -11" in e for e in errors) == 2
    assert sum("the decoder did not end in 2 s" in e for e in errors) == 1
    healthy = [Station(tmp_path / n / "scores").read_table().to_pylist() for n in ("whole", "poisoned")]
    by_key = {row["key"]: row for row in healthy[0]}
    for row in healthy[1]:
        if not row["decode_error"]:
            assert row["phash"] == by_key[row["key"]]["phash"]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_a_jump_of_the_error_rate_stops_the_run_and_the_wave_is_not_written(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes]
) -> None:
    write_pool(tmp_path, pairs_of([noise_picture(1, 8, 8)] * 300 + [b"no picture"] * 700), files=1)
    recipe = small_recipe(tmp_path, untrained, rows_per_block=100, floors=HardFloors(min_short_side_px=16))
    with pytest.raises(StationError, match=r"of \d+ rows can't be decoded or measured, at most 50% are allowed"):
        score(recipe)
    assert not Station(tmp_path / "scores").wave(0).is_finished()
    assert score(dataclasses.replace(recipe, max_error_share=1.0)).counts["gate_undecodable"] == 700


def test_the_watch_judges_a_wave_by_the_waves_before() -> None:
    watch = ErrorWatch.before({"rows": 1000, "gate_undecodable": 20, "gate_too_small": 900}, 0.5, 0.25, FAULTS)
    assert watch.share_before == 0.02
    watch.check(260, 1000, "w")
    watch.check(499, 499, "w")
    with pytest.raises(StationError, match="jumped from 2.0% to 28.0%"):
        watch.check(280, 1000, "w")
    assert ErrorWatch.before({"rows": 0}, 0.5, 0.25, FAULTS).share_before is None


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_ten_random_kills_leave_the_scores_of_an_undisturbed_run(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes]
) -> None:
    """Kills of actors, of the raylet (all workers of the node with it) and of the driver; the seed is printed."""
    seed = int(os.environ.get("EMU_RAY_FAULT_SEED", "0")) or random.SystemRandom().randrange(1 << 30)
    print(f"EMU_RAY_FAULT_SEED={seed}")
    rng = random.Random(seed)
    images = [noise_picture(n, *rng.choice([(64, 48), (96, 96), (80, 120)])) for n in range(160)]
    images[7], images[100] = images[7][:200], b"no picture"
    for name in ("calm", "rough"):
        write_pool(tmp_path / name, pairs_of(images), files=8)
    score(small_recipe(tmp_path / "calm", untrained))
    kills = [*["actor"] * 5, *["raylet"] * 2, *["driver"] * 3]
    rng.shuffle(kills)
    for _ in range(20):
        if _drive(small_recipe(tmp_path / "rough", untrained), tmp_path, tmp_path / "rough.log", rng, kills) == 0:
            break
    log = (tmp_path / "rough.log").read_text()
    assert not kills, f"only {10 - len(kills)} kills fell into the run\n{log[-2000:]}"
    assert Station(tmp_path / "rough" / "scores").is_finished(), log[-3000:]
    keys = [Station(tmp_path / n).read_table(["key"])["key"].to_numpy() for n in ("rough/pool", "rough/scores")]
    assert np.array_equal(np.sort(keys[0]), np.sort(keys[1]))
    assert column_digests(tmp_path / "rough") == column_digests(tmp_path / "calm")
    counts = Station(tmp_path / "rough" / "scores").require("scores").counts
    assert counts["rows"] == counts["measured"] + sum(n for name, n in counts.items() if name.startswith("gate_"))


def _drive(recipe: ScoreRecipe, folder: Path, log: Path, rng: random.Random, kills: list[str]) -> int:
    """Run the job in a process of its own and kill what `kills` says next, until it ends; its exit code."""
    driver = start_scoring(recipe, folder, log)
    tree = psutil.Process(driver.pid)
    everyone: dict[int, psutil.Process] = {}
    until = time.monotonic() + 240
    next_kill = time.monotonic() + (rng.uniform(8, 14))
    try:
        while driver.poll() is None and time.monotonic() < until:
            everyone.update({p.pid: p for p in _children(tree)})
            if kills and time.monotonic() > next_kill and (target := _target(tree, kills[0], rng)):
                print(f"kill {kills.pop(0)} {target.pid}", flush=True)
                target.kill()
                next_kill = time.monotonic() + rng.uniform(2, 6)
            time.sleep(0.1)
        return driver.poll() if driver.poll() is not None else -1  # type: ignore[return-value]
    finally:
        end_all(driver, everyone.values())


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_a_node_that_dies_is_done_without_and_the_scores_are_those_of_an_undisturbed_run(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes]
) -> None:
    """Two nodes of one CPU; the second one's raylet is killed after the first wave; the same run ends the work."""
    for name in ("calm", "rough"):
        write_pool(tmp_path / name, pairs_of([noise_picture(n, 96, 96) for n in range(160)]), files=8)
    log, everyone = tmp_path / "rough.log", {}
    driver = start_scoring(small_recipe(tmp_path / "rough", untrained), tmp_path, log, TWO_NODES)
    is_killed, until = False, time.monotonic() + 240
    try:
        while driver.poll() is None and time.monotonic() < until:
            everyone.update({p.pid: p for p in _children(psutil.Process(driver.pid))})
            if not is_killed and " of 4 written" in (said := log.read_text()):
                psutil.Process(int(said.partition("SECOND ")[2].split()[0])).kill()
                is_killed = True
            time.sleep(0.1)
    finally:
        end_all(driver, everyone.values())
    assert is_killed and "SCORED" in log.read_text(), log.read_text()[-3000:]  # a node that died makes Ray exit with 1
    score(small_recipe(tmp_path / "calm", untrained))
    assert column_digests(tmp_path / "rough") == column_digests(tmp_path / "calm")


def _children(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return tree.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _target(tree: psutil.Process, kind: str, rng: random.Random) -> psutil.Process | None:
    if kind == "driver":
        return tree
    names = {"raylet": "raylet", "actor": "ray::"}
    found = []
    for process in _children(tree):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if (kind == "raylet" and "/raylet/raylet" in line) or (
            kind == "actor" and line.startswith(names[kind]) and "MapWorker" in line
        ):
            found.append(process)
    return rng.choice(found) if found else None
