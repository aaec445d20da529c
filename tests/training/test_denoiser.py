"""Training of the denoiser on a pipeline of random weights: what it starts from, resume with a held-out part, what it exports."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emu_ray.errors import RecipeError
from emu_ray.generation.generator import SamplingSettings
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models.autoencoder import FourierAutoencoder
from emu_ray.models.denoiser import DenoiserRecipe
from emu_ray.training.denoiser import train_denoiser
from emu_ray.training.guard import GuardRecipe
from emu_ray.training.latent_set import LatentSet
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.looks import at_work
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.samples import SampleSheetRecipe
from emu_ray.training.start import DenoiserTraining, load_start
from emu_ray.training.stopping import StoppingRecipe
from tests.training.processes import together, worker_of_group

PAIRS = 12
LOOP = LoopRecipe(
    steps=40, batch_size=4, learning_rate=3e-2, warmup_steps=1, ema_decay=0.5, inspect_every_steps=2, checkpoint_every_steps=7, seed=5
)  # fmt: skip
FRESH = DenoiserRecipe(
    block_out_channels=(8, 16), layers_per_block=(1, 1), attention=(True, True), heads=(1, 2), cross_attention_dim=16, norm_num_groups=4
)  # fmt: skip


def _latents(side: int = 4) -> LatentSet:
    means = np.random.default_rng(0).normal(size=(PAIRS, 4, side, side)).astype(np.float16)
    return LatentSet(means, [f"a photo of ball {i}" for i in range(PAIRS)])


def _recipe(checkpoint: Path, **changes: Any) -> DenoiserTraining:
    stopping = StoppingRecipe(held_out=0.25, patience=4, draws=2)
    return replace(DenoiserTraining(start=str(checkpoint), loop=LOOP, stopping=stopping), **changes)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items()}


class DyingWorker(LocalWorker):
    """Dies at the look after the first checkpoint was begun."""

    def log(self, metrics: dict[str, float]) -> None:
        if metrics["step"] == 8:
            raise KeyboardInterrupt


def test_a_resumed_tuning_stops_where_an_undisturbed_one_does_with_the_same_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    recipe, data = _recipe(checkpoint), _latents()
    straight, reached = train_denoiser(recipe, data, LocalWorker(tmp_path / "straight"))
    assert "has not improved" in reached.stop_reason
    assert 7 < reached.step < LOOP.steps, "the stop must lie behind the checkpoint, and depend on looks before it"
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(recipe, data, DyingWorker(tmp_path / "again"))
    again, reached_again = train_denoiser(recipe, data, LocalWorker(tmp_path / "again"))
    assert (reached_again.step, reached_again.best_step) == (reached.step, reached.best_step)
    assert reached_again.inspections == reached.inspections
    ours, theirs = _weights(straight.unet), _weights(again.unet)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("denoiser", [None, FRESH], ids=["taken over", "fresh"])
def test_the_exported_model_draws_at_the_size_it_learned(
    denoiser: DenoiserRecipe | None, checkpoint: Path, tmp_path: Path
) -> None:
    loop = replace(LOOP, steps=1, inspect_every_steps=None)
    recipe = _recipe(checkpoint, loop=loop, denoiser=denoiser, stopping=None)
    pipeline, _ = train_denoiser(recipe, _latents(side=8), LocalWorker())
    pipeline.save_pretrained(tmp_path)
    assert EmuPipeline.load(tmp_path).size_px == 8 * 4


def test_another_autoencoder_takes_the_place_of_a_vae_that_start_need_not_have(
    pipeline: EmuPipeline, checkpoint: Path, tmp_path: Path
) -> None:
    start, other = tmp_path / "start", tmp_path / "autoencoder"
    shutil.copytree(checkpoint, start, ignore=shutil.ignore_patterns("vae", "unet"))
    vae = FourierAutoencoder.from_pretrained(checkpoint / "vae")
    vae.latent_mean.fill_(7.0)
    vae.save_pretrained(other)
    recipe = _recipe(start, autoencoder=str(other), denoiser=FRESH)
    started, network = load_start(recipe, latent_side=4)
    assert (started.vae.latent_mean == 7).all()
    assert network.config.in_channels == 4
    assert {p.name for p in start.iterdir()}.isdisjoint({"vae", "unet"}), "the start was written into"


def test_a_set_that_is_held_out_whole_is_refused(checkpoint: Path) -> None:
    data = _latents().take(np.arange(1))
    with pytest.raises(RecipeError, match="1 pairs, and 1 would be held out"):
        train_denoiser(_recipe(checkpoint), data, LocalWorker())


def _sharded(rank: int, start: str) -> list[str]:
    """Trains sharded with looks and a sheet; the devices that the U-Net ends on."""
    loop = replace(LOOP, steps=4, parallel=ParallelRecipe(sharding="fsdp"), show_every_images=8)
    sheet = SampleSheetRecipe(prompts=("a ball",), settings=SamplingSettings(steps=1, guidance=1.0))
    recipe = replace(_recipe(Path(start)), loop=loop, samples=sheet)
    pipeline, progress = train_denoiser(recipe, _latents(), worker_of_group())
    assert progress.step == 4
    if rank == 0:
        assert pipeline(["a ball"], num_inference_steps=1, output_type="np").images.shape[0] == 1
    return sorted({p.device.type for p in pipeline.unet.parameters()})


def test_a_gpu_draws_with_copies_of_the_frozen_parts_and_the_u_net_itself(checkpoint: Path) -> None:
    recipe = _recipe(checkpoint, loop=replace(LOOP, parallel=ParallelRecipe(precision="bf16")))
    pipeline, network = load_start(recipe, latent_side=4)
    elsewhere = LocalWorker(device="meta")  # a device that isn't the CPU
    own = at_work(pipeline, recipe, elsewhere)
    assert own.unet is network
    told = {name: next(getattr(own, name).parameters()) for name in ("text_encoder", "text_encoder_2", "vae")}
    assert {value.device.type for value in told.values()} == {"meta"}
    assert [value.dtype for value in told.values()] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert {p.device.type for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters()} == {"cpu"}
    assert next(pipeline.text_encoder.parameters()).dtype == torch.float32


class BrightnessJudge:
    """Bright pictures are appealing, and contrast counts as faithful: a judge without weights."""

    def __init__(self, recipe: GuardRecipe, device: str = "cpu") -> None:
        pass

    def appeal(self, images: np.ndarray) -> np.ndarray:
        """(N,) mean of all pixels, 0 to 1."""
        return images.mean((1, 2, 3)) / 255

    def faithfulness(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """(N,) their deviation, 0 to 1."""
        return images.std((1, 2, 3)) / 255


def _first_look(rank: int, start: str, sharding: Any) -> dict[str, float]:
    """What the guard finds in bf16 when nothing was learned yet."""
    parallel = ParallelRecipe(sharding=sharding, precision="bf16")
    loop = replace(LOOP, steps=2, learning_rate=1e-12, inspect_every_steps=2, parallel=parallel)
    guard = GuardRecipe(judge=BrightnessJudge, max_prompts=2, settings=SamplingSettings(steps=2, guidance=1.0))
    _, progress = train_denoiser(replace(_recipe(Path(start)), loop=loop, guard=guard), _latents(), worker_of_group())
    assert progress.base is not None and progress.base["appeal"] > 0
    return progress.inspections[0]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_the_base_is_measured_in_the_precision_of_the_looks(checkpoint: Path, sharding: str) -> None:
    for found in together(2, _first_look, str(checkpoint), sharding):
        assert (found["appeal_change"], found["faithfulness_change"]) == (0.0, 0.0)


@pytest.mark.slow
def test_a_sharded_training_ends_with_a_whole_pipeline_on_rank_0(checkpoint: Path) -> None:
    assert together(2, _sharded, str(checkpoint)) == [["cpu"], ["meta"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"caption_dropout": 10}, "caption_dropout .* 0 to 1, found 10"),
        ({"noise_offset": -3.0}, "noise_offset .* at least 0, found -3"),
        ({"max_pairs": 0}, "max_pairs .* at least 1, found 0"),
        ({"samples": SampleSheetRecipe(prompts=("a ball",))}, "samples are drawn every loop.show_every_images"),
        (
            {"guard": GuardRecipe(judge=object), "loop": replace(LOOP, inspect_every_steps=None)},
            "a guard looks every loop.inspect_every_steps",
        ),
        ({"guard": GuardRecipe(judge=object), "stopping": None}, "the guard has nothing to draw"),
    ],
)
def test_settings_that_can_not_be_or_would_do_nothing_are_refused(
    checkpoint: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        _recipe(checkpoint, **changes)


@pytest.mark.parametrize("changes", [{"held_out": 1.0}, {"held_out": 0.0}, {"patience": 0}, {"draws": 0}])
def test_a_stopping_that_can_not_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(changes))):
        StoppingRecipe(**changes)
