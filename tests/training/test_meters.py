"""What a run says of its speed: counted operations, shares of the step, goodput."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emu_ray.training import loop, meters
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.meters import Meter, flops_per_image
from emu_ray.training.parallel import skeleton_of
from emu_ray.training.player import Task
from tests.training.test_parallel import _examples, _task


class Linear(Task):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(5, 7, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.network(batch["x"]).square().mean()}


def test_operations_are_counted_as_by_hand() -> None:
    task = Linear()
    counted = flops_per_image(task, skeleton_of(task.network), {"x": torch.randn(3, 5)}, torch.device("cpu"))
    assert counted == 2 * 5 * 7 * 2  # forward, and the gradient of the weights; the input asks for none


def test_operations_of_a_unet_are_those_of_a_real_pass_and_nothing_is_left_behind() -> None:
    task, batch = _task(), _examples().batch(torch.arange(4).numpy(), [torch_rng(i) for i in range(4)])
    before = copy.deepcopy(task.network.state_dict())
    counted = flops_per_image(task, skeleton_of(task.network), batch, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        task(batch)["loss"].backward()
    assert counted * 4 == counter.get_total_flops()
    assert all(torch.equal(value, before[name]) for name, value in task.network.state_dict().items())
    assert {p.device.type for p in task.network.parameters()} == {"cpu"}


def torch_rng(seed: int):
    import numpy as np

    return np.random.default_rng(seed)


def test_on_a_known_gpu_a_run_tells_its_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loop, meters):
        monkeypatch.setattr(module, "peak_tflops", lambda device: 2.0)
    progress = loop.train(_task(), _examples(), LoopRecipe(steps=4, batch_size=4, log_every_steps=2), LocalWorker())
    for line in progress.history:
        assert line["mfu"] == pytest.approx(line["tflops_a_worker"] / 2.0)
        assert 0 < line["mfu"] < 1


def test_the_parts_of_a_step_add_up_to_nearly_all_of_it() -> None:
    progress = loop.train(_task(), _examples(), LoopRecipe(steps=8, batch_size=8, log_every_steps=8), LocalWorker())
    line = progress.history[0]
    shares = [value for name, value in line.items() if name.endswith("_share")]
    assert 0.9 <= sum(shares) <= 1.0
    assert line["compute_share"] > 0.5
    assert line["images_per_s"] > 0


def test_goodput_is_the_share_of_the_time_that_went_into_steps_that_count() -> None:
    meter = Meter(torch.device("cpu"), 1, seconds_before=50.0, began=time.time() - 100.0)
    assert meter.read()["goodput"] == pytest.approx(0.5, abs=0.01)
