"""Training on a real GPU: resumed, in bfloat16, sharded, and what is said when memory ends. More GPUs than one are tested on the CPU, by gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import MemoryShortError
from emu_ray.models.denoiser import DenoiserRecipe, build
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe, train
from emu_ray.training.parallel import ParallelRecipe, mesh_of, shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
RECIPE = LoopRecipe(
    steps=12, batch_size=8, learning_rate=1e-3, warmup_steps=3, checkpoint_every_steps=5, log_every_steps=4, seed=7
)
SIZES = DenoiserRecipe(
    block_out_channels=(32, 64),
    layers_per_block=(1, 1),
    attention=(True, True),
    heads=(1, 2),
    cross_attention_dim=32,
    norm_num_groups=8,
)


def _task() -> DenoiserTask:
    torch.manual_seed(1)
    return DenoiserTask(build(SIZES, latent_channels=4, latent_side=8, text_width=16), NoiseSchedule(ScheduleRecipe()))


def _examples() -> LatentExamples:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((32, 4, 8, 8)).astype(np.float16)
    return LatentExamples(latents, 1 + np.arange(32), torch.randn(33, 5, 16))


class _DyingWorker(LocalWorker):
    def log(self, metrics: dict[str, float]) -> None:
        if metrics["step"] == 8:
            raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path: Path, precision: str) -> None:
    recipe = replace(RECIPE, parallel=ParallelRecipe(precision=precision))  # type: ignore[arg-type]
    straight, again, data = _task(), _task(), _examples()
    lines: list[dict[str, float]] = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # else two runs differ with nothing resumed
        train(straight, data, recipe, LocalWorker(tmp_path / "straight", lines.append, device="cuda"))
        with pytest.raises(KeyboardInterrupt):
            train(_task(), data, recipe, _DyingWorker(tmp_path / "again", device="cuda"))
        train(again, data, recipe, LocalWorker(tmp_path / "again", device="cuda"))
    assert all(value.device.type == "cuda" for value in straight.network.state_dict().values())
    assert {"mfu", "tflops_a_worker", "gpu_memory_gib"} <= lines[-1].keys()
    a, b = (task.network.state_dict() for task in (straight, again))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) == 0


def test_a_gpu_learns_what_the_cpu_learns() -> None:
    far = {}
    for precision in ("fp32", "bf16"):
        histories = []
        for device in ("cpu", "cuda"):
            recipe = replace(RECIPE, log_every_steps=1, parallel=ParallelRecipe(precision=precision))  # type: ignore[arg-type]
            histories.append(
                [line["loss"] for line in train(_task(), _examples(), recipe, LocalWorker(device=device)).history]
            )
        far[precision] = max(abs(a / b - 1) for a, b in zip(*histories, strict=True))
    print(far)
    assert far["fp32"] < 2e-3 and far["bf16"] < 2e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sharded_network_says_on_nccl_what_the_whole_one_says(tmp_path: Path, precision: str) -> None:
    whole, sharded = _task().to("cuda"), _task().to("cuda")
    recipe = ParallelRecipe(sharding="fsdp", precision=precision)  # type: ignore[arg-type]
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        shard(sharded.network, mesh_of(recipe, 1, "cuda"), recipe)
        rngs = [np.random.default_rng(i) for i in range(8)]
        batch = {name: value.to("cuda") for name, value in _examples().batch(np.arange(8), rngs).items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            expected = whole(batch)["loss"]
        found = sharded(batch)["loss"]
        expected.backward()
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-4 if precision == "fp32" else 2e-2)
        norms = [torch.nn.utils.clip_grad_norm_(task.network.parameters(), 1e9) for task in (whole, sharded)]
        assert float(norms[1].full_tensor()) == pytest.approx(
            float(norms[0]), rel=1e-3 if precision == "fp32" else 5e-2
        )
    finally:
        dist.destroy_process_group()


def test_a_batch_that_does_not_fit_is_one_sentence() -> None:
    data = LatentExamples(np.zeros((4, 4, 512, 512), np.float16), np.ones(4, int), torch.zeros(2, 5, 16))
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + 2**29
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(MemoryShortError, match="ran out of GPU memory at 4 samples a pass: lower micro_batch_size"):
            train(_task(), data, replace(RECIPE, batch_size=4), LocalWorker(device="cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_compiled_it_learns_the_same() -> None:
    losses = []
    for compile_it in (False, True):
        recipe = replace(RECIPE, steps=4, log_every_steps=1, parallel=ParallelRecipe(compile=compile_it))
        losses.append(
            [line["loss"] for line in train(_task(), _examples(), recipe, LocalWorker(device="cuda")).history]
        )
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
