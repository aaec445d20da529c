"""Sharded and accumulated steps against a plain one: the same losses, the same weights, a part of the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import CheckpointError, MemoryShortError, RecipeError
from emu_ray.models.denoiser import DenoiserRecipe, build
from emu_ray.training.average import local
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import Inspection, LoopRecipe, train
from emu_ray.training.parallel import ParallelRecipe, blocks, require_copies, skeleton_of
from emu_ray.training.player import Task
from tests.training.processes import together, worker_of_group

RECIPE = LoopRecipe(
    steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=2, checkpoint_every_steps=3, log_every_steps=2, seed=5
)
SHARDED = ParallelRecipe(sharding="fsdp")


SIZES = DenoiserRecipe(
    block_out_channels=(16, 32), layers_per_block=(1, 1), attention=(True, True), heads=(2, 2), cross_attention_dim=16, norm_num_groups=4
)  # fmt: skip


def _task(sizes: DenoiserRecipe = SIZES) -> DenoiserTask:
    torch.manual_seed(0)
    return DenoiserTask(build(sizes, latent_channels=4, latent_side=4, text_width=12), NoiseSchedule(ScheduleRecipe()))


def _examples() -> LatentExamples:
    rng = np.random.default_rng(0)
    texts = torch.from_numpy(rng.standard_normal((13, 3, 12), dtype=np.float32))
    return LatentExamples(rng.standard_normal((20, 4, 4, 4)).astype(np.float16), 1 + np.arange(20) % 12, texts)


def _learned(
    recipe: LoopRecipe, folder: Path | None = None, inspect: Any = None, sizes: DenoiserRecipe = SIZES
) -> dict[str, Any]:
    """What a run of this process ends with; `bytes_share` is what it held of weights and moments, 1 without sharding."""
    task = _task(sizes)
    worker = worker_of_group(folder) if torch.distributed.is_initialized() else LocalWorker(folder)
    whole = sum(p.numel() for p in task.network.parameters())
    held: list[int] = []

    def look(step: int, network: nn.Module) -> Inspection:
        held.append(sum(local(p).numel() for p in network.parameters()))
        return inspect(step, network) if inspect else Inspection(metrics={})

    progress = train(task, _examples(), replace(recipe, inspect_every_steps=recipe.steps), worker, look)
    return {
        "losses": [h["loss"] for h in progress.history],
        "weights": {k: v for k, v in task.network.state_dict().items() if v.device.type != "meta"},
        "share": held[-1] / whole if held else None,
        "class": type(task.network).__name__,
    }


def _close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-4) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


def _ways(rank: int, folder: str) -> dict[str, Any]:
    """Ways to spread the same run over the processes of this group."""
    found = {"ddp": _learned(RECIPE), "fsdp": _learned(replace(RECIPE, parallel=SHARDED), Path(folder) / "fsdp")}
    if torch.distributed.get_world_size() == 4:
        return found | {"copies of shards": _learned(replace(RECIPE, parallel=replace(SHARDED, shard_over=2)))}
    return found | {
        "accumulated": _learned(replace(RECIPE, parallel=SHARDED, micro_batch_size=1)),
        "recomputed": _learned(replace(RECIPE, parallel=replace(SHARDED, activation_checkpointing=True))),
        "bf16": _learned(replace(RECIPE, parallel=replace(SHARDED, precision="bf16"))),
        "fewer than a copy": _learned(
            replace(RECIPE, parallel=replace(SHARDED, shard_over=4))
        ),  # as an elastic run may have
        "shares that differ": _learned(replace(RECIPE, batch_size=7, parallel=SHARDED)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_sharded_run_learns_what_one_process_learns_and_resumes_on_any_number(count: int, tmp_path: Path) -> None:
    whole, odd = _learned(RECIPE), _learned(replace(RECIPE, batch_size=7))
    first, *others = together(count, _ways, str(tmp_path))
    for way, found in first.items():
        loose, alone = 50 if way == "bf16" else 1, odd if way == "shares that differ" else whole
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4 * loose), way
        if way != "bf16":  # in which Adam's sign of a gradient near 0 may be either: its losses are compared
            assert _close(found["weights"], alone["weights"]), way
        assert found["class"] == "UNet2DConditionModel", way
    assert first["fsdp"]["share"] <= 1 / count + 0.05
    assert first["ddp"]["share"] == 1
    assert all(not other["fsdp"]["weights"] for other in others), "only rank 0 holds whole weights in the end"
    if count == 4:
        assert 0.45 <= first["copies of shards"]["share"] <= 0.55
    longer = replace(RECIPE, steps=9)
    straight = _learned(longer)
    for processes in (1, 2) if count == 4 else (1, 4):
        resumed = _resumed(longer, tmp_path / "fsdp", processes)
        assert _close(resumed["weights"], straight["weights"]), processes
        assert resumed["losses"] == pytest.approx(straight["losses"], rel=1e-4), processes


def _resumed(recipe: LoopRecipe, folder: Path, count: int) -> dict[str, Any]:
    import shutil

    copied = folder.with_name(f"{folder.name}-on-{count}")
    shutil.copytree(folder, copied)
    if count == 1:
        return _learned(recipe, copied)
    return together(count, _resume, replace(recipe, parallel=SHARDED), str(copied))[0]


def _resume(rank: int, recipe: LoopRecipe, folder: str) -> dict[str, Any]:
    return _learned(recipe, Path(folder))


def test_micro_batches_add_up_to_the_batch() -> None:
    assert _close(_learned(replace(RECIPE, micro_batch_size=3))["weights"], _learned(RECIPE)["weights"])


def test_recomputed_activations_change_nothing() -> None:
    recomputed = _learned(replace(RECIPE, parallel=ParallelRecipe(activation_checkpointing=True)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(recomputed["weights"].values(), _learned(RECIPE)["weights"].values(), strict=True)
    )


def test_half_precision_keeps_weights_in_float32_and_learns_nearly_the_same() -> None:
    half, full = _learned(replace(RECIPE, parallel=ParallelRecipe(precision="bf16"))), _learned(RECIPE)
    assert {v.dtype for v in half["weights"].values()} == {torch.float32}
    assert half["losses"] == pytest.approx(full["losses"], rel=0.01)
    assert half["losses"] != full["losses"]


def test_a_network_without_blocks_can_not_recompute_them() -> None:
    task = Task()
    task.network = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="activation_checkpointing"):
        train(task, _examples(), replace(RECIPE, parallel=ParallelRecipe(activation_checkpointing=True)), LocalWorker())


def test_a_network_whose_parameters_are_all_frozen_is_refused() -> None:
    task = _task()
    task.network.requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter"):
        train(task, _examples(), RECIPE, LocalWorker())


def test_only_parameters_that_ask_for_a_gradient_change_and_are_saved(tmp_path: Path) -> None:
    task = _task()
    task.network.requires_grad_(False)
    task.network.conv_out.requires_grad_(True)
    before = {k: v.clone() for k, v in task.network.state_dict().items()}
    train(task, _examples(), RECIPE, LocalWorker(tmp_path))
    changed = {k for k, v in task.network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"conv_out.weight", "conv_out.bias"}
    assert set(Checkpoints(tmp_path).committed()[0].shapes) == {"network.conv_out.weight", "network.conv_out.bias"}


def test_blocks_are_the_innermost_parts_that_diffusers_does_not_split() -> None:
    found = blocks(_task().network)
    assert {type(part).__name__ for part in found} == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert len({id(part) for part in found}) == len(found)


def test_a_skeleton_has_the_structure_and_no_memory() -> None:
    network = _task().network
    twin = skeleton_of(network)
    assert isinstance(twin, UNet2DConditionModel)
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    twin.load_state_dict(network.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), network.parameters(), strict=True))


def test_shards_that_do_not_divide_the_workers_are_refused() -> None:
    with pytest.raises(RecipeError, match="shard_over must divide .* 3 for 4 workers"):
        require_copies(ParallelRecipe(sharding="fsdp", shard_over=3), 4)
    with pytest.raises(RecipeError, match="shard_over is for sharding 'fsdp'"):
        ParallelRecipe(shard_over=2)


def test_a_checkpoint_of_another_network_is_refused_by_the_first_difference(tmp_path: Path) -> None:
    _learned(RECIPE, tmp_path)
    other = _task()
    other.network.conv_out = nn.Conv2d(16, 4, 1)
    with pytest.raises(
        CheckpointError,
        match=r"another network's: expected conv_out.weight of shape \[4, 16, 1, 1\], found \[4, 16, 3, 3\]",
    ):
        train(other, _examples(), RECIPE, LocalWorker(tmp_path))


def test_a_worker_out_of_memory_says_what_to_lower() -> None:
    class Hungry(DenoiserTask):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    small = _task()
    with pytest.raises(MemoryShortError, match="out of GPU memory at 8 samples a pass: lower micro_batch_size"):
        train(Hungry(small.network, small.schedule), _examples(), RECIPE, LocalWorker())


@pytest.mark.slow
def test_a_compiled_network_learns_the_same() -> None:
    one = replace(SIZES, block_out_channels=(16,), layers_per_block=(1,), attention=(True,), heads=(2,))  # level
    compiled = _learned(replace(RECIPE, parallel=ParallelRecipe(compile=True)), sizes=one)
    plain = _learned(RECIPE, sizes=one)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert _close(compiled["weights"], plain["weights"])
