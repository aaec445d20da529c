"""The train function: resume, order, workers, inspection, and what it refuses."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from emu_ray.errors import NumericsError, RecipeError
from emu_ray.training.average import Average
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.feed import Batch
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import Inspection, LoopRecipe, Progress, learning_rate_at, train
from emu_ray.training.order import rows_at, sample_rng
from emu_ray.training.player import Task

RECIPE = LoopRecipe(
    steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=3, checkpoint_every_steps=5, log_every_steps=4, seed=7
)


class Line(Task):
    """Least squares of a small network; remembers the rows that it saw."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[int] = []
        self.poison_at = poison_at

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.seen += batch["row"].tolist()
        loss = (self.network(batch["x"])[:, 0] - batch["y"]).square().mean()
        return {"loss": loss * float("nan") if self.poison_at == len(self.seen) else loss}


class Points:
    """Ten points, read with a little noise."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(10, 3)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        x = self.x[rows] + np.stack([g.normal(0, 0.1, 3) for g in rngs]).astype(np.float32)
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(self.x[rows].sum(1)), "row": torch.from_numpy(rows)}


class DyingWorker(LocalWorker):
    """Dies two steps after the first checkpoint was begun."""

    def log(self, metrics: dict[str, float]) -> None:
        if metrics["step"] == 8:
            raise KeyboardInterrupt


def _weights(task: Task) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in task.network.state_dict().items()}


def _saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint."""
    checkpoints = Checkpoints(folder)
    newest = checkpoints.committed()[0]
    saved = dcp.FileSystemReader(folder / newest.folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in saved.items()}
    dcp.load(state, checkpoint_id=folder / newest.folder, no_dist=True)
    return state


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    straight, again = Line(), Line()
    train(straight, Points(), RECIPE, LocalWorker(tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        train(Line(), Points(), RECIPE, DyingWorker(tmp_path / "again"))
    train(again, Points(), RECIPE, LocalWorker(tmp_path / "again"))
    assert len(again.seen) == 7 * 4
    assert again.seen == straight.seen[5 * 4 :]
    assert _equal(_weights(straight), _weights(again))
    a, b = (_saved(tmp_path / name) for name in ("straight", "again"))
    assert a.keys() == b.keys()
    assert {name.split(".")[0] for name in a} == {"network", "adamw", "average"}
    assert _equal(a, b)


def test_a_finished_run_does_no_step_more(tmp_path: Path) -> None:
    first, second = Line(), Line()
    train(first, Points(), RECIPE, LocalWorker(tmp_path))
    train(second, Points(), RECIPE, LocalWorker(tmp_path))
    assert second.seen == []
    assert _equal(_weights(first), _weights(second))


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own() -> None:
    rows = rows_at(np.arange(30), 10, seed=3)
    epochs = [rows[i : i + 10].tolist() for i in (0, 10, 20)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_row_and_the_randomness_of_a_position_do_not_depend_on_who_asks() -> None:
    whole = rows_at(np.arange(25), 10, seed=3)
    assert np.array_equal(rows_at(np.arange(1, 25, 2), 10, seed=3), whole[1::2])
    assert sample_rng(3, 8).random() == sample_rng(3, 8).random()
    assert len({sample_rng(s, p).random() for s in (3, 4) for p in range(50)}) == 100


def _one_of_two(rank: int, folder: str, disagree: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    worker = LocalWorker()
    worker.rank, worker.world_size = rank, 2
    task = Line()
    inspect = Scripted([1.0, 2.0], stop_at=2) if rank == 0 else Scripted([9.0, 3.0, 2.0, 1.0])
    recipe = replace(RECIPE, inspect_every_steps=3 if disagree else None)
    progress = train(task, Points(), recipe, worker, inspect if disagree else None)
    torch.save(task.network.state_dict(), f"{folder}/rank{rank}.pt")
    torch.save([progress.step, progress.best_step, progress.stop_reason], f"{folder}/reached{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), False), nprocs=2)
    alone = Line()
    train(alone, Points(), RECIPE, LocalWorker())
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert _equal(first, second)
    assert all(torch.allclose(first[k], v, atol=1e-5) for k, v in _weights(alone).items())


def test_rank_0_decides_for_all_when_to_stop_and_which_weights_are_best(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), True), nprocs=2)
    assert [torch.load(tmp_path / f"reached{r}.pt") for r in (0, 1)] == [[6, 6, "enough"]] * 2
    assert _equal(*(torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)))


def test_a_batch_with_fewer_images_than_workers_is_refused() -> None:
    worker = LocalWorker()
    worker.world_size = 5
    with pytest.raises(RecipeError, match="batch_size.* 4 images for 5 workers"):
        train(Line(), Points(), RECIPE, worker)


class Scripted:
    """Inspections with given scores; keeps the weights that it was shown."""

    def __init__(self, scores: list[float], stop_at: int | None = None) -> None:
        self.scores, self.stop_at, self.shown = scores, stop_at, []

    def __call__(self, step: int, network: nn.Module) -> Inspection:
        self.shown.append({k: v.clone() for k, v in network.state_dict().items()})
        reason = "enough" if len(self.shown) == self.stop_at else None
        return Inspection(
            metrics={"score": self.scores[len(self.shown) - 1]},
            score=self.scores[len(self.shown) - 1],
            stop_reason=reason,
        )


def test_an_early_stop_ends_training_and_keeps_the_best_weights() -> None:
    task, look = Line(), Scripted([1.0, 3.0, 2.0, 9.0], stop_at=3)
    progress = train(task, Points(), replace(RECIPE, inspect_every_steps=3), LocalWorker(), look)
    assert (progress.step, progress.best_step, progress.stop_reason) == (9, 6, "enough")
    assert _equal(_weights(task), look.shown[1])
    assert [i["score"] for i in progress.inspections] == [1.0, 3.0, 2.0]


def test_inspection_sees_the_average_and_leaves_training_alone() -> None:
    plain, looked = Line(), Line()
    train(plain, Points(), RECIPE, LocalWorker())
    train(
        looked,
        Points(),
        replace(RECIPE, inspect_every_steps=4),
        LocalWorker(),
        lambda step, network: Inspection(metrics={}),
    )
    assert _equal(_weights(plain), _weights(looked))


def test_a_stopped_run_stays_stopped_after_a_restart(tmp_path: Path) -> None:
    recipe = replace(RECIPE, inspect_every_steps=3)
    first, second = Line(), Line()
    train(first, Points(), recipe, LocalWorker(tmp_path), Scripted([1.0, 3.0, 2.0], stop_at=3))
    progress = train(second, Points(), recipe, LocalWorker(tmp_path), Scripted([]))
    assert progress.stop_reason == "enough"
    assert _equal(_weights(first), _weights(second))


def test_a_loss_that_is_not_finite_raises_and_the_checkpoint_stays_good(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="step 8"):
        train(Line(poison_at=8 * 4), Points(), RECIPE, LocalWorker(tmp_path))
    assert Checkpoints(tmp_path).committed()[0].step == 5
    assert all(v.isfinite().all() for v in _saved(tmp_path).values())


def test_an_empty_set_is_refused() -> None:
    points = Points()
    points.x = points.x[:0]
    with pytest.raises(RecipeError, match="empty"):
        train(Line(), points, RECIPE, LocalWorker())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("log_every_steps", 0),
        ("checkpoint_every_steps", 0),
        ("inspect_every_steps", 0),
        ("warmup_steps", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("adam_beta2", 1.5),
        ("seed", -1),
        ("checkpoint_every_s", 0.0),
        ("ema_decay", 1.5),
        ("ema_decay", -0.1),
    ],
)
def test_a_value_that_no_loop_can_have_is_refused_by_its_field(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"^{name} of LoopRecipe .*found {value}"):
        replace(RECIPE, **{name: value})


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    cosine = replace(RECIPE, decay="cosine", steps=1000, warmup_steps=10)
    rates = [learning_rate_at(s, cosine) for s in range(1001)]
    assert rates[0] == pytest.approx(1e-3, rel=1e-3)
    assert max(rates) == pytest.approx(1e-2, rel=1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert learning_rate_at(900, replace(cosine, decay="constant")) == 1e-2


def test_the_average_of_constant_weights_is_those_weights_and_none_keeps_the_last() -> None:
    network = nn.Linear(2, 1)
    average, last = Average(network, 0.9), Average(network, None)
    for step in range(1, 4):
        with torch.no_grad():
            network.weight.fill_(float(step))
            network.bias.fill_(1.0)
        average.update(step)
        last.update(step)
    assert torch.equal(last.shadow["weight"], network.weight)
    assert 1 < average.shadow["weight"][0, 0] < 3


def test_history_speaks_of_every_logged_step() -> None:
    progress: Progress = train(Line(), Points(), RECIPE, LocalWorker())
    assert [h["step"] for h in progress.history] == [4, 8, 12]
    assert [h["images_seen"] for h in progress.history] == [16, 32, 48]


class Slow(Checkpoints):
    """Copies what is saved half a second late."""

    def _write(self, *arguments: object) -> None:
        time.sleep(0.5)
        super()._write(*arguments)  # type: ignore[arg-type]


def test_an_update_waits_until_the_state_before_it_was_copied(tmp_path: Path) -> None:
    class Late(LocalWorker):
        def checkpoints(self) -> Checkpoints:
            return Slow(tmp_path / "late")

    recipe = replace(RECIPE, steps=6)
    train(Line(), Points(), recipe, Late(tmp_path))
    train(Line(), Points(), recipe, LocalWorker(tmp_path / "usual"))
    late, usual = (sorted((tmp_path / name).iterdir()) for name in ("late", "usual"))
    assert [path.name[:13] for path in late] == [path.name[:13] for path in usual] == ["step-00000005", "step-00000006"]
    shutil.rmtree(late[1])
    shutil.rmtree(usual[1])
    assert _equal(_saved(tmp_path / "late"), _saved(tmp_path / "usual"))


def test_a_slow_step_is_saved_by_the_clock(tmp_path: Path) -> None:
    class Sluggish(Line):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            time.sleep(0.05)
            return super().forward(batch)

    saved: list[int] = []

    class Watched(Checkpoints):
        def save(self, state: dict[str, Tensor], step: int, progress: dict) -> None:
            saved.append(step)
            super().save(state, step, progress)

    class Keeps(LocalWorker):
        def checkpoints(self) -> Checkpoints:
            return Watched(tmp_path)

    train(Sluggish(), Points(), replace(RECIPE, checkpoint_every_steps=100, checkpoint_every_s=0.2), Keeps(tmp_path))
    assert len(saved) >= 3, "twelve steps of 50 ms and more, a save at least every 200 ms"
    assert saved[-1] == 12
