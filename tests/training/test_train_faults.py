"""Kills of workers, nodes and drivers while a checkpoint is being written: what comes out is what an undisturbed run gives, to the last bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emu_ray.evaluation.haystack_judge import HaystackJudge
from emu_ray.generation.generator import SamplingSettings
from emu_ray.stations import Station
from emu_ray.stations.folders import base_folder
from emu_ray.training import denoiser_run
from emu_ray.training.denoiser_run import DenoiserRun, run_denoiser
from emu_ray.training.guard import GuardRecipe
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.on_ray import WorkersRecipe
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.stopping import StoppingRecipe
from tests.s3_server import S3Server
from tests.training.small_latents import write_latents
from tests.training.train_process import (
    A_NODE_MORE,
    NODES_OF_ONE_CPU,
    Hold,
    Tree,
    held,
    start_training,
    watched_work,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # of an idle machine they take a fraction
EVERY = 3  # steps between checkpoints


def both(root: Path, start: Path, cpus_each: float = 0.5) -> list[DenoiserRun]:
    """Pretraining, and quality-tuning of what it gives under a guard, on two workers; writes their latents."""
    for seed, use in enumerate(("pretrain", "quality")):
        write_latents(root / "latents" / use, seed=seed)
    loop = LoopRecipe(
        steps=12,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        ema_decay=0.9,
        log_every_steps=1,
        checkpoint_every_steps=EVERY,
    )
    tuning = LoopRecipe(**{**vars(loop), "inspect_every_steps": 2, "seed": 5})
    stopping = StoppingRecipe(held_out=0.2, patience=4, draws=2)
    guard = GuardRecipe(
        judge=HaystackJudge,
        weights=str(base_folder() / "judge" / "attributes.safetensors"),
        prompts=("a photo of a red metal ball in a meadow",),
        pictures_each=2,
        patience=9,
        settings=SamplingSettings(steps=2, guidance=1.0),
    )
    workers = WorkersRecipe(count=2, cpus_each=cpus_each)
    return [
        DenoiserRun(root=str(root), run="base", latents="pretrain", training=DenoiserTraining(start=str(start), loop=loop), workers=workers),
        DenoiserRun(
            root=str(root), run="tuned", latents="quality", workers=workers,
            training=DenoiserTraining(start="ROOT/checkpoints/base", noise_offset=0.1, stopping=stopping, guard=guard, loop=tuning),
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def calm(checkpoint: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of an undisturbed run of both."""
    root = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser_run, "denoiser_work", watched_work)
        for run in both(root, checkpoint):
            run_denoiser(run)
    yield root


def result(root: Path, run: str) -> dict[str, Any]:
    """The weights as they lie on the disk, the held-out losses, and the losses of the steps."""
    station = Station(root / "checkpoints" / run)
    extra = station.require("checkpoint").extra
    (weights,) = (root / "checkpoints" / run / "unet").glob("*.safetensors")
    losses = [(int(h["step"]), h["images_seen"], h["loss"], h["grad_norm"]) for h in extra["history"]]
    return {
        "weights": weights.read_bytes(), "inspections": extra["inspections"], "losses": losses,
        "best_step": extra["best_step"], "stop_reason": extra["stop_reason"],
    }  # fmt: skip


def reads(root: Path, run: str) -> list[tuple[int, int, list[str]]]:
    """(step, rank, names) in the order in which they were begun."""
    return [tuple(json.loads(line)) for line in (root / f"reads-{run}.jsonl").read_text().splitlines()]


def assert_as_calm(root: Path, calm: Path, run: str, kills: list[Hold]) -> None:
    """The same bits, the same rows a step, and each restart at the last committed checkpoint."""
    assert result(root, run) == result(calm, run)
    undisturbed = {(step, rank): names for step, rank, names in reads(calm, run)}
    assert sorted(undisturbed) == [(step, rank) for step in range(12) for rank in (0, 1)]
    seen = reads(root, run)
    assert {(step, rank) for step, rank, _ in seen} == set(undisturbed)
    assert all(undisturbed[step, rank] == names for step, rank, names in seen)
    steps = [step for step, rank, _ in seen if rank == 0]
    starts = [after for before, after in itertools.pairwise(steps) if after <= before]
    assert starts == [hold.step - EVERY for hold in kills if hold.run == run]
    # a kill costs what came after the last commit: an interval, and what was done while the next was being written
    assert all(before - after < 2 * EVERY for before, after in itertools.pairwise(steps))


def test_killed_workers_and_drivers_change_no_bit_of_pretraining_and_tuning(
    checkpoint: Path, calm: Path, tmp_path: Path
) -> None:
    """A worker and then the driver in each; a driver is started again while its workers are still dying."""
    runs, log = both(tmp_path, checkpoint), tmp_path / "log"
    kills = [(Hold("base", 6), 1), (Hold("base", 9), None), (Hold("tuned", 6), 0), (Hold("tuned", 9), None)]
    (tmp_path / "holds.pickle").write_bytes(pickle.dumps([hold for hold, _ in kills]))
    with Tree() as tree:
        driver = start_training(runs, tmp_path, log)
        for hold, rank in kills:
            tree.wait(driver, log, lambda hold=hold: held(hold, tmp_path) is not None)  # type: ignore[misc]
            if rank is None:
                driver.kill()
                driver.wait(20)
                driver = start_training(runs, tmp_path, log)
            else:
                os.kill((held(hold, tmp_path) or [])[rank]["pid"], signal.SIGKILL)
        tree.wait(driver, log, lambda: "ALL TRAINED" in log.read_text())
    for run in ("base", "tuned"):
        assert_as_calm(tmp_path, calm, run, [hold for hold, _ in kills])


def test_nodes_that_die_change_no_bit_of_pretraining_and_tuning(checkpoint: Path, calm: Path, tmp_path: Path) -> None:
    """A head and three nodes of one CPU; one that holds a worker is killed in each run."""
    runs, log = both(tmp_path, checkpoint, cpus_each=1), tmp_path / "log"
    kills = [Hold("base", 6), Hold("tuned", 6)]
    (tmp_path / "holds.pickle").write_bytes(pickle.dumps(kills))
    with Tree() as tree:
        driver = start_training(runs, tmp_path, log, NODES_OF_ONE_CPU.format(count=3))
        for hold in kills:
            tree.wait(driver, log, lambda hold=hold: held(hold, tmp_path) is not None)  # type: ignore[misc]
            raylets = {
                words[1]: int(words[2])
                for words in map(str.split, log.read_text().splitlines())
                if words[:1] == ["NODE"]
            }
            on = [worker["node"] for worker in held(hold, tmp_path) or [] if worker["node"] in raylets]
            os.kill(raylets[on[0]], signal.SIGKILL)
        tree.wait(driver, log, lambda: "ALL TRAINED" in log.read_text())
    for run in ("base", "tuned"):
        assert_as_calm(tmp_path, calm, run, kills)


def test_a_killed_worker_changes_no_bit_of_a_run_whose_root_is_on_s3(
    checkpoint: Path, calm: Path, s3: S3Server, tmp_path: Path
) -> None:
    run, log, hold = both(tmp_path, checkpoint)[0], tmp_path / "log", Hold("base", 6)
    run = dataclasses.replace(run, root=f"{s3.uri}/training")
    write_latents(f"{run.root}/latents/pretrain")
    (tmp_path / "holds.pickle").write_bytes(pickle.dumps([hold]))
    with Tree() as tree:
        driver = start_training([run], tmp_path, log)
        tree.wait(driver, log, lambda: held(hold, tmp_path) is not None)
        os.kill((held(hold, tmp_path) or [])[1]["pid"], signal.SIGKILL)
        tree.wait(driver, log, lambda: "ALL TRAINED" in log.read_text())
    trained, (weights,) = (
        Station(f"{run.root}/checkpoints/base"),
        (calm / "checkpoints" / "base" / "unet").glob("*.safetensors"),
    )
    assert trained.get_bytes(f"unet/{weights.name}") == weights.read_bytes()
    steps = [step for step, rank, _ in reads(tmp_path, "base") if rank == 0]
    assert [after for before, after in itertools.pairwise(steps) if after <= before] == [3]


def test_a_machine_that_is_told_to_end_leaves_a_checkpoint_before_it_goes(
    checkpoint: Path, calm: Path, tmp_path: Path
) -> None:
    """Ray's own drain with a deadline, as an autoscaler calls it for a spot machine; no checkpoint is due in this run."""
    base, log = both(tmp_path, checkpoint, cpus_each=1)[0], tmp_path / "log"
    loop = dataclasses.replace(base.training.loop, checkpoint_every_steps=1000)
    run = dataclasses.replace(base, training=dataclasses.replace(base.training, loop=loop))
    gate = tmp_path / "gate-base"
    gate.touch()
    with Tree() as tree:
        driver = start_training([run], tmp_path, log, NODES_OF_ONE_CPU.format(count=2))
        tree.wait(driver, log, lambda: (tmp_path / "reads-base.jsonl").exists() and len(reads(tmp_path, "base")) == 4)
        said = [line.split() for line in log.read_text().splitlines()]
        (address,) = (words[1] for words in said if words[:1] == ["ADDRESS"])
        workers_on = set((tmp_path / "nodes-base").read_text().split())
        node = next(words[1] for words in said if words[:1] == ["NODE"] and words[1] in workers_on)
        subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={address}", f"--node-id={node}",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=6"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        gate.unlink()
        tree.wait(driver, log, lambda: "ALL TRAINED" in log.read_text())
    steps = [step for step, rank, _ in reads(tmp_path, "base") if rank == 0]
    assert len((tmp_path / "nodes-base").read_text().split()) == 4  # begun twice, on two workers
    assert (
        steps.count(0) == 1 and len(steps) - 12 <= 2
    )  # steps of a second each; the checkpoint of the last reading is what counts
    assert result(tmp_path, "base")["weights"] == result(calm, "base")["weights"]


def test_a_run_that_starts_small_grows_when_the_cluster_does_and_reads_the_same_rows(
    checkpoint: Path, calm: Path, tmp_path: Path
) -> None:
    """One node of one CPU, and a second one at the third step: the second worker joins at a checkpoint."""
    run, log = both(tmp_path, checkpoint)[0], tmp_path / "log"
    run = dataclasses.replace(run, workers=WorkersRecipe(count=2, least=1, cpus_each=1, look_for_more_every_s=1))
    gate, grow = tmp_path / "gate-base", tmp_path / "grow"
    gate.write_text("4")  # Ray counts the nodes every 20 s
    with Tree() as tree:
        driver = start_training([run], tmp_path, log, A_NODE_MORE.format(grow=str(grow)))
        tree.wait(driver, log, lambda: (tmp_path / "reads-base.jsonl").exists() and len(reads(tmp_path, "base")) == 2)
        grow.touch()
        gate.unlink()
        tree.wait(driver, log, lambda: "ALL TRAINED" in log.read_text())
    seen = reads(tmp_path, "base")
    workers_at = {step: {rank for at, rank, _ in seen if at == step} for step in range(12)}
    assert workers_at[0] == {0} and workers_at[11] == {0, 1}
    joined = next(step for step in range(12) if workers_at[step] == {0, 1})
    assert joined > 0 and joined % EVERY == 0  # at a checkpoint, not at the beginning

    def batches(of: Path, step: int) -> set[str]:
        """The rows of the last attempt at a step."""
        by_rank = {rank: names for at, rank, names in reads(of, "base") if at == step}
        return {name for names in by_rank.values() for name in names}

    assert all(batches(tmp_path, step) == batches(calm, step) for step in range(12))
    losses = [[loss for *_, loss, _ in result(root, "base")["losses"]] for root in (tmp_path, calm)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
