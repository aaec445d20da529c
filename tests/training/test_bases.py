"""Quality-tuning of published bases, whole and by LoRA: what comes out loads in plain diffusers, and changed only where it should."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from emu_ray.diffusion.schedule import ScheduleRecipe
from emu_ray.errors import EmuRayError, InputError, NumericsError, RecipeError
from emu_ray.generation import EmuPipeline, Generator, SamplingSettings
from emu_ray.generation.base_folder import require_base
from emu_ray.models.denoiser import DenoiserRecipe
from emu_ray.training.denoiser import encode_captions, train_denoiser
from emu_ray.training.latent_set import LatentSet
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.lora import LoraRecipe, add_adapter, fuse_adapter
from emu_ray.training.start import DenoiserTraining, load_start, save_tuned
from emu_ray.training.stopping import StoppingRecipe
from tests.generation.small_bases import BUILDERS, SIDE, SIZE_PX, edit_json

PAIRS = 6
LOOP = LoopRecipe(
    steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=1, ema_decay=0.5, checkpoint_every_steps=2, seed=5
)
LORA = LoraRecipe(rank=3, alpha=6.0)
CLASSES = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
MICRO = DenoiserRecipe(
    block_out_channels=(8, 16), layers_per_block=(1, 1), attention=(True, True), heads=(1, 2), cross_attention_dim=16, norm_num_groups=4,
    micro_conditioning=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def _latents(side: int = SIDE, sizes: bool = True) -> LatentSet:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(PAIRS, 4, side, side)).astype(np.float16)
    ids = np.concatenate([rng.integers(8, 200, (PAIRS, 4)), np.full((PAIRS, 2), SIZE_PX)], axis=1).astype(np.int32)
    return LatentSet(means, [f"a photo of ball {i}" for i in range(PAIRS)], ids if sizes else None)


def _recipe(start: Path, **changes: Any) -> DenoiserTraining:
    return replace(DenoiserTraining(start=str(start), loop=LOOP, noise_offset=0.1), **changes)


def _plain(folder: Path, cls: Any = DiffusionPipeline) -> Any:
    pipeline = cls.from_pretrained(folder, safety_checker=None, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _drawn(pipeline: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(3)
    return pipeline("a ball", num_inference_steps=2, generator=noise, output_type="np", guidance_scale=2.0).images


def _tuned(recipe: DenoiserTraining, folder: Path, data: LatentSet | None = None) -> Any:
    pipeline, _ = train_denoiser(recipe, data or _latents(), LocalWorker())
    save_tuned(pipeline, recipe, folder)
    return pipeline


@pytest.mark.parametrize("name", BUILDERS)
def test_a_tuned_base_loads_in_plain_diffusers_and_only_its_u_net_changed(
    bases: dict[str, Path], name: str, tmp_path: Path
) -> None:
    tuned = _tuned(_recipe(bases[name]), tmp_path / "tuned")
    plain = _plain(tmp_path / "tuned", CLASSES[name])
    assert type(plain) is CLASSES[name]
    assert np.isfinite(_drawn(plain)).all()
    assert not np.allclose(_drawn(plain), _drawn(_plain(bases[name])), atol=1e-3)
    before = load_file(bases[name] / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(tuned.unet.state_dict()[key], after[key]) for key in after)
    for file in bases[name].rglob("*"):
        if file.is_file() and file.relative_to(bases[name]).parts[0] not in ("unet", "model_index.json"):
            assert filecmp.cmp(file, tmp_path / "tuned" / file.relative_to(bases[name]), shallow=False), file
    again = require_base(str(tmp_path / "tuned"))
    assert again.schedule == require_base(str(bases[name])).schedule
    image = Generator(tmp_path / "tuned").generate(["a ball"], [3], SamplingSettings(steps=2, guidance=2.0))[0]
    assert np.abs(np.round(_drawn(plain)[0] * 255) - image).max() <= 1


@pytest.mark.parametrize("name", BUILDERS)
def test_an_adapter_trains_alone_and_comes_out_as_a_file_and_fused(
    bases: dict[str, Path], name: str, tmp_path: Path
) -> None:
    recipe = _recipe(bases[name], lora=LORA)
    pipeline, _ = train_denoiser(recipe, _latents(), LocalWorker())
    base = load_file(bases[name] / "unet" / "diffusion_pytorch_model.safetensors")
    trained = {n for n, p in pipeline.unet.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in n or ".lora_B." in n for n in trained)
    for key, value in pipeline.unet.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(value, base[key.replace(".base_layer.", ".")]), key
    save_tuned(pipeline, recipe, tmp_path / "tuned")

    fused = load_file(tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors")
    assert fused.keys() == base.keys()
    changed = {key for key in base if not torch.equal(fused[key], base[key])}
    targets = {key for key in base if key.removesuffix(".weight").endswith(LORA.targets) and key.endswith(".weight")}
    assert changed == targets
    by_file = _plain(bases[name])
    by_file.load_lora_weights(tmp_path / "tuned", weight_name="pytorch_lora_weights.safetensors")
    whole = _plain(tmp_path / "tuned", CLASSES[name])
    assert np.allclose(_drawn(by_file), _drawn(whole), atol=1e-4)
    assert not np.allclose(_drawn(whole), _drawn(_plain(bases[name])), atol=1e-3)
    state = load_file(tmp_path / "tuned" / "pytorch_lora_weights.safetensors")
    assert {len(v) for k, v in state.items() if "lora_A" in k or "lora.down" in k} == {LORA.rank}


class Dying(LocalWorker):
    """Dies at its first log after the first checkpoint."""

    def log(self, metrics: dict[str, float]) -> None:
        if metrics["step"] >= 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_resumed_tuning_ends_with_the_weights_of_an_undisturbed_one(
    bases: dict[str, Path], lora: LoraRecipe | None, tmp_path: Path
) -> None:
    stopping = StoppingRecipe(held_out=0.3, draws=2)
    loop = replace(LOOP, log_every_steps=1, inspect_every_steps=2)
    recipe = _recipe(bases["sdxl"], lora=lora, loop=loop, stopping=stopping)
    straight, reached = train_denoiser(recipe, _latents(), LocalWorker(tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(recipe, _latents(), Dying(tmp_path / "again"))
    for _ in range(2):
        again, reached_again = train_denoiser(recipe, _latents(), LocalWorker(tmp_path / "again"))
        assert reached_again.inspections == reached.inspections
        ours, theirs = straight.unet.state_dict(), again.unet.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_adapter_changes_nothing_before_it_is_trained_and_is_the_same_for_every_rank(bases: dict[str, Path]) -> None:
    def adapted() -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_pretrained(bases["sd15"] / "unet").eval()
        add_adapter(unet, LORA, seed=7)
        return unet

    noisy, text = torch.randn(1, 4, SIDE, SIDE), torch.randn(1, 5, 32)
    with torch.no_grad():
        plain = UNet2DConditionModel.from_pretrained(bases["sd15"] / "unet").eval()
        ours, base = (u(noisy, torch.tensor([3]), encoder_hidden_states=text).sample for u in (adapted(), plain))
    assert torch.equal(ours, base)
    one, two = adapted().state_dict(), adapted().state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_adapter_that_changes_by_fusing_is_refused(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNet2DConditionModel.from_pretrained(bases["sd15"] / "unet")
    add_adapter(unet, LORA, seed=7)
    for name, value in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    monkeypatch.setattr(unet, "fuse_lora", lambda: None)
    with pytest.raises(NumericsError, match="fusing the adapter changed"):
        fuse_adapter(unet)


def test_another_schedule_comes_with_its_own_scheduler_and_a_weighting_does_not(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    loop = replace(LOOP, steps=1)
    weighted = replace(require_base(str(bases["sd15"])).schedule, min_snr_gamma=5.0)
    tuned = _tuned(_recipe(bases["sd15"], loop=loop, schedule=weighted), tmp_path / "same")
    assert type(tuned.scheduler).__name__ == "PNDMScheduler"
    name = "scheduler/scheduler_config.json"
    assert filecmp.cmp(bases["sd15"] / name, tmp_path / "same" / name, shallow=False)
    _tuned(_recipe(bases["sd15"], loop=loop, schedule=ScheduleRecipe()), tmp_path / "other")
    scheduler = _plain(tmp_path / "other").scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert require_base(str(tmp_path / "other")).schedule == ScheduleRecipe()


def test_captions_are_encoded_once_and_row_0_is_that_of_no_caption(bases: dict[str, Path]) -> None:
    pipeline, _ = load_start(_recipe(bases["sdxl"]), SIDE)
    text, row_of = encode_captions(pipeline, ["b", "a", "b", ""], batch_size=2)
    assert row_of == {"": 1, "a": 2, "b": 3}
    assert text.tokens_BTD.shape[0] == text.pooled_BD.shape[0] == 4
    assert not text.tokens_BTD[0].any() and text.tokens_BTD[1].any(), (
        "SDXL drops captions to zeros, and says something else to an empty one"
    )


def test_latents_without_sizes_do_not_train_a_u_net_that_is_told_them(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="told sizes and crops.*encode them again"):
        train_denoiser(_recipe(bases["sdxl"]), _latents(sizes=False), LocalWorker())
    train_denoiser(_recipe(bases["sd15"], loop=replace(LOOP, steps=1)), _latents(sizes=False), LocalWorker())


def test_our_own_u_net_is_told_sizes_where_it_was_built_so(checkpoint: Path, tmp_path: Path) -> None:
    recipe = _recipe(checkpoint, denoiser=MICRO, loop=replace(LOOP, steps=1))
    tuned = _tuned(recipe, tmp_path / "micro", _latents(side=4))
    assert tuned.unet.config.addition_embed_type == "text_time"
    again = EmuPipeline.load(tmp_path / "micro")
    again.set_progress_bar_config(disable=True)
    tuned.set_progress_bar_config(disable=True)
    drawn = _drawn(again)
    assert np.array_equal(drawn, _drawn(tuned))
    told: list[Any] = []
    again.unet.register_forward_pre_hook(lambda _, __, k: told.append(k["added_cond_kwargs"]), with_kwargs=True)
    again("a ball", height=16, width=24, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert told[0]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]
    assert torch.equal(told[0]["text_embeds"], again.texts.features(["a ball"]).pooled_BD)
    assert Generator(tmp_path / "micro").generate(["a ball"], [3], SamplingSettings(steps=2)).shape == (1, 16, 16, 3)
    _tuned(_recipe(tmp_path / "micro", lora=LORA, loop=replace(LOOP, steps=1)), tmp_path / "lora", _latents(side=4))
    again.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    fused = EmuPipeline.load(tmp_path / "lora")
    fused.set_progress_bar_config(disable=True)
    assert np.allclose(_drawn(again), _drawn(fused), atol=1e-4)


def test_our_own_model_may_draw_with_a_published_autoencoder(
    bases: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    recipe = _recipe(checkpoint, autoencoder=str(bases["sdxl"] / "vae"), denoiser=MICRO, loop=replace(LOOP, steps=1))
    _tuned(recipe, tmp_path / "tuned")
    again = EmuPipeline.load(tmp_path / "tuned")
    assert isinstance(again.vae, AutoencoderKL)
    assert Generator(tmp_path / "tuned").generate(["a ball"], [3], SamplingSettings(steps=2)).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"denoiser": MICRO}, RecipeError, "a fresh denoiser is built for CLIP and T5, found a StableDiffusionPipeline"),
        ({"denoiser": MICRO, "lora": LORA}, RecipeError, "nothing to adapt"),
        ({"lora": LoraRecipe(targets=("to_q", "to_x"))}, RecipeError, "no layer of the U-Net is called 'to_x'"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_its_base_is_refused_before_a_weight_is_read(
    bases: dict[str, Path], changes: dict[str, Any], error: type[EmuRayError], said: str
) -> None:
    with pytest.raises(error, match=said):
        load_start(_recipe(bases["sd15"], **changes), SIDE)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}])
def test_an_adapter_that_is_none_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="LoraRecipe"):
        LoraRecipe(**bad)


def test_a_base_with_half_precision_files_alone_is_tuned_to_full_ones(bases: dict[str, Path], tmp_path: Path) -> None:
    start = tmp_path / "half"
    _plain(bases["sdxl"]).to(dtype=torch.float16).save_pretrained(start, variant="fp16")
    assert not (start / "unet" / "diffusion_pytorch_model.safetensors").exists()
    edit_json(start / "model_index.json", force_zeros_for_empty_prompt=True)
    _tuned(_recipe(start, loop=replace(LOOP, steps=1)), tmp_path / "tuned")
    assert np.isfinite(_drawn(_plain(tmp_path / "tuned", StableDiffusionXLPipeline))).all()
