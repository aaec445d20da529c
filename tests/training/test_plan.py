"""The plan of memory and cost: its counts against real tensors and hand figures; the 2.8 B model sharded in shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.errors import RecipeError
from emu_ray.models.denoiser import DenoiserRecipe, build, emu
from emu_ray.training import parallel
from emu_ray.training.average import Average, local
from emu_ray.training.denoising import DenoiserTask
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.plan import (
    GIB,
    PlanRecipe,
    Stretch,
    fake_batch,
    images_per_s,
    kept_bytes,
    need,
    shapes_alone,
    told,
    without_memory,
)
from emu_ray.training.player import AdamWSettings, Player

SMALL = DenoiserRecipe(
    block_out_channels=(16, 32), layers_per_block=(1, 1), attention=(True, True), heads=(2, 2), cross_attention_dim=16, norm_num_groups=4
)  # fmt: skip
MACHINE = PlanRecipe(latent_channels=4, text_width=12, text_tokens=3, downsampling=2, encoder_parameters=0)
STRETCH = Stretch(
    name="small", size_px=16, images=1000, batch_size=8, workers=2, parallel=ParallelRecipe(sharding="fsdp")
)


def test_kept_bytes_and_operations_in_shapes_are_those_of_a_real_pass() -> None:
    imagined = without_memory(SMALL, STRETCH, MACHINE)
    expected = kept_bytes(imagined, fake_batch(imagined, STRETCH, MACHINE), shapes_alone())
    torch.manual_seed(0)
    network = build(SMALL, latent_channels=4, latent_side=8, text_width=12)
    batch = {
        "clean": torch.randn(1, 4, 8, 8), "noise": torch.randn(1, 4, 8, 8), "t": torch.tensor([3]), "text": torch.randn(1, 3, 12),
    }  # fmt: skip
    assert kept_bytes(network, batch) == expected
    assert expected[0] > 0
    assert len(expected[1]) == len(parallel.blocks(network))


def test_bytes_of_weights_are_shared_out_and_activations_are_not() -> None:
    two, four = need(SMALL, STRETCH, MACHINE), need(SMALL, replace(STRETCH, workers=4), MACHINE)
    assert two.weights == 4 * two.parameters / 2
    assert (four.weights, four.gradients, four.moments, four.average) == (
        two.weights / 2,
        two.gradients / 2,
        two.moments / 2,
        two.average / 2,
    )
    assert four.activations_per_image == two.activations_per_image
    copies = need(SMALL, replace(STRETCH, workers=4, parallel=ParallelRecipe(sharding="fsdp", shard_over=2)), MACHINE)
    assert copies.weights == two.weights
    whole = need(SMALL, replace(STRETCH, parallel=ParallelRecipe()), MACHINE)
    assert whole.weights == 4 * whole.parameters


def test_recomputing_keeps_less_and_half_precision_halves_it() -> None:
    plain = need(SMALL, STRETCH, MACHINE)
    less = need(
        SMALL, replace(STRETCH, parallel=ParallelRecipe(sharding="fsdp", activation_checkpointing=True)), MACHINE
    )
    assert less.per_image() < plain.per_image()
    half = need(SMALL, replace(STRETCH, parallel=ParallelRecipe(sharding="fsdp", precision="bf16")), MACHINE)
    assert 0.45 < half.per_image() / plain.per_image() < 0.6
    assert less.flops_per_image == plain.flops_per_image


def test_autocast_copies_the_weights_once_a_pass_however_many_images_it_has() -> None:
    whole = need(SMALL, replace(STRETCH, parallel=ParallelRecipe()), MACHINE)
    half = need(SMALL, replace(STRETCH, parallel=ParallelRecipe(precision="bf16")), MACHINE)
    assert half.gathered == 2 * half.parameters and whole.gathered == 0
    assert half.weights == whole.weights  # the master copy is float32
    assert 0.45 < half.per_image() / whole.per_image() < 0.6


def test_the_largest_batch_just_fits() -> None:
    found = need(SMALL, STRETCH, MACHINE)
    memory = 4 * GIB
    largest = found.largest_batch(memory)
    assert found.fixed() + largest * found.per_image() <= memory < found.fixed() + (largest + 1) * found.per_image()
    assert found.largest_batch(GIB) == 0


def test_time_and_money_follow_from_operations_and_peak() -> None:
    found = need(SMALL, STRETCH, MACHINE)
    assert images_per_s(STRETCH, found, MACHINE) == pytest.approx(2 * 989e12 * 0.35 / found.flops_per_image)
    slower = replace(MACHINE, mfu=0.175)
    assert images_per_s(STRETCH, found, slower) == pytest.approx(images_per_s(STRETCH, found, MACHINE) / 2)


def test_what_does_not_fit_is_said_with_what_to_do() -> None:
    found = need(SMALL, STRETCH, MACHINE)
    crowded = replace(MACHINE, gpu_memory_gib=(found.fixed() + 100 * found.per_image()) / GIB)
    text = told(SMALL, [replace(STRETCH, batch_size=800)], crowded)
    assert "400 do NOT fit: set --training.loop.micro-batch-size" in text
    assert "NOT even the weights fit" in told(SMALL, [STRETCH], replace(MACHINE, gpu_memory_gib=1.0))


@pytest.mark.parametrize(("field", "value"), [("gpu", "H1000"), ("mfu", 0.0), ("mfu", 1.5)])
def test_a_machine_that_can_not_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"{field} of PlanRecipe"):
        replace(MACHINE, **{field: value})


@pytest.mark.slow
def test_the_real_unet_takes_a_sharded_step_in_shapes_and_its_shards_are_what_the_plan_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2.8 B parameters over 64 imagined GPUs, 8 to a copy: built, wrapped, stepped, averaged; no memory, no network."""
    recipe = ParallelRecipe(sharding="fsdp", shard_over=8, precision="bf16", activation_checkpointing=True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    try:
        mesh = parallel.mesh_of(recipe, 64, "cpu")
        monkeypatch.setattr(parallel, "mesh_of", lambda *_: mesh)  # made outside: a mesh's numbers must be real
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = build(emu(), latent_channels=16, latent_side=32, text_width=4864)
            parameters = sum(p.numel() for p in network.parameters())
            units = len(parallel.blocks(network))
            task = DenoiserTask(network, NoiseSchedule(ScheduleRecipe()))
            adamw = AdamWSettings(learning_rate=1e-4, beta2=0.99, weight_decay=0.01, clip_norm=1.0)
            player = Player(task, recipe, adamw, 64, torch.device("cpu"))
            average = Average(task.network, 0.999)
            batch = {
                "clean": torch.randn(2, 16, 32, 32),
                "noise": torch.randn(2, 16, 32, 32),
                "t": torch.tensor([1, 2]),
                "text": torch.randn(2, 154, 4864),
            }
            losses, _ = player.backward([batch])
            norm = player.clip()
            player.update(1e-4)
            average.update(1)
            held = sum(local(p).numel() for p in task.network.parameters())
    finally:
        dist.destroy_process_group()
    assert 2.8e9 * 0.98 <= parameters <= 2.8e9 * 1.02
    assert units > 50
    assert losses["loss"].shape == norm.shape == ()
    assert held == pytest.approx(parameters / 8, rel=0.01)
    assert {p.dtype for p in task.network.parameters()} == {torch.float32}
    planned = need(
        emu(), Stretch(name="256", size_px=256, images=1, batch_size=128, workers=64, parallel=recipe), PlanRecipe()
    )  # fmt: skip
    assert 4 * held == pytest.approx(planned.weights, rel=0.01)
