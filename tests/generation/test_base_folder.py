"""A folder that is no base that we can train is refused in one sentence, by its JSON and headers, and no code of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from emu_ray.diffusion.schedule import ScheduleRecipe
from emu_ray.errors import InputError, RecipeError
from emu_ray.generation.base_folder import require_base
from emu_ray.stations import Station
from tests.generation.small_bases import BUILDERS, edit_json
from tests.s3_server import S3Server

INDEX = "model_index.json"
UNET = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
EPSILON = ScheduleRecipe(prediction="epsilon", zero_terminal_snr=False)
V = ScheduleRecipe(prediction="v_prediction", zero_terminal_snr=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build(root / name) for name, build in BUILDERS.items()}


@pytest.mark.parametrize(
    ("name", "family", "schedule"), [("sd15", "sd", EPSILON), ("sd21", "sd", V), ("sdxl", "sdxl", EPSILON)]
)
def test_a_base_says_what_it_is_and_how_it_was_trained(
    bases: dict[str, Path], name: str, family: str, schedule: ScheduleRecipe
) -> None:
    found = require_base(str(bases[name]))
    assert (found.family.name, found.schedule) == (family, schedule)


def test_our_own_checkpoint_is_a_base(checkpoint: Path) -> None:
    found = require_base(str(checkpoint))
    assert (found.family.name, found.schedule) == ("emu", ScheduleRecipe())


def test_a_base_on_s3_is_judged_where_it_lies(bases: dict[str, Path], s3: S3Server) -> None:
    station = Station(f"s3://{s3.bucket}/base-folder/sdxl")
    station.upload_folder(bases["sdxl"])
    assert require_base(station.uri).family.name == "sdxl"
    station.put_file(UNET, (bases["sdxl"] / UNET).read_bytes()[:-4])
    with pytest.raises(InputError, match="it is cut off"):
        require_base(station.uri)


def _cut(folder: Path) -> None:
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[: len(whole) // 2])


def _noise(folder: Path) -> None:
    (folder / UNET).write_bytes(b"\xff" * 1000)


def _without_a_tensor(folder: Path) -> None:
    state = load_file(folder / UNET)
    state.pop("conv_out.bias")
    save_file(state, folder / UNET)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


def _without_a_shard(folder: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    network.save_pretrained(folder / "unet", max_shard_size="60KB")
    next(iter(sorted((folder / "unet").glob("*-00002-of-*.safetensors")))).unlink()


def _with_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    edit_json(folder / INDEX, text_encoder=["evil", "CLIPTextModel2"])


def _json(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, **changes)


def _gone(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("sd15", _gone(INDEX), "no model_index.json: it is half-written, or no pipeline"),
        ("sd15", _json(INDEX, _class_name="FluxPipeline"), "found 'FluxPipeline': such a base is not supported"),
        ("sd15", _json(INDEX, _class_name="StableDiffusionInpaintPipeline"), "found 'StableDiffusionInpaintPipeline'"),
        ("sdxl", _json(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"), "not supported"),
        ("sdxl", _json(INDEX, requires_aesthetics_score=True), "found a refiner"),
        ("sd15", _json(INDEX, controlnet=["diffusers", "ControlNetModel"]), "found also 'controlnet'"),
        ("sd15", _with_code, "text_encoder to be a CLIPTextModel, found .'evil', 'CLIPTextModel2'"),
        ("sd15", _json("unet/config.json", in_channels=9), "found 9 and 4: an inpainting model"),
        ("sd15", _json("unet/config.json", addition_embed_type="text"), "addition_embed_type None, found 'text'"),
        ("sdxl", _json("unet/config.json", addition_embed_type=None), "addition_embed_type text_time, found None"),
        ("sdxl", _json("unet/config.json", projection_class_embeddings_input_dim=24 + 5 * 8), "a refiner"),
        ("sd15", _json("unet/config.json", time_cond_proj_dim=256), "expected no time_cond_proj_dim, found 256"),
        ("sd15", _json("unet/config.json", cross_attention_dim=40), "width 40, its text encoders give 32"),
        ("sd15", _json("unet/config.json", block_out_channels=[8, 32]), "its weights don't fit its config.json"),
        ("sd15", _json(SCHEDULER, beta_schedule="linear"), "expected beta_schedule scaled_linear, found 'linear'"),
        ("sd15", _json(SCHEDULER, beta_schedule=None), "expected beta_schedule scaled_linear, found 'linear'"),
        ("sd15", _json(SCHEDULER, prediction_type="sample"), "epsilon or v_prediction, found 'sample'"),
        ("sd15", _json(SCHEDULER, trained_betas=[0.1]), "trained_betas"),
        ("sd15", _json(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "found 'FlowMatchEulerDiscrete"),
        ("sd15", _json(SCHEDULER, _class_name="LCMScheduler"), "found 'LCMScheduler'"),
        ("sd15", _gone("text_encoder/config.json"), "expected text_encoder/config.json in it, found none: .* half-written"),
        ("sd15", _gone("text_encoder/model.safetensors"), "expected model.safetensors, found none"),
        ("sd15", _gone("safety_checker/model.safetensors"), "safety_checker: expected model.safetensors, found none"),
        ("sd15", _gone("tokenizer/vocab.json"), "expected tokenizer.json, or vocab.json and merges.txt"),
        ("sd15", _cut, "it is cut off; fetch it anew"),
        ("sd15", _noise, "expected a safetensors file, found something else"),
        ("sd15", _without_a_tensor, "expected conv_out.bias of shape .*, found none"),
        ("sd15", _pickled, "a format that can run code when it is read"),
        ("sd15", _without_a_shard, "names .*-00002-of-.*, which is not there"),
        ("sd15", lambda folder: (folder / INDEX).write_text("[]"), "expected a JSON object, found list"),
        ("sd15", lambda folder: (folder / INDEX).write_text("{"), "expected JSON, found something else"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_one_sentence(
    bases: dict[str, Path], name: str, spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases[name], folder)
    spoil(folder)
    with pytest.raises(InputError, match=said) as refused:
        require_base(str(folder))
    assert "\n" not in str(refused.value)


def test_a_text_encoder_that_lacks_a_tensor_is_not_filled_with_random_numbers(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["sd15"], folder)
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state.pop(next(name for name in state if "final_layer_norm.weight" in name))
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(InputError, match="1 are missing .*final_layer_norm.weight"):
        require_base(str(folder)).family.load(folder)


def test_epsilon_at_zero_terminal_snr_is_refused_in_a_base_too(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["sdxl"], tmp_path / "base")
    edit_json(tmp_path / "base" / SCHEDULER, rescale_betas_zero_snr=True)
    with pytest.raises(RecipeError, match="undefined at the last step"):
        require_base(str(tmp_path / "base"))


def test_a_single_network_an_adapter_and_a_single_file_say_what_to_give(bases: dict[str, Path], tmp_path: Path) -> None:
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 32}
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D")
    network = ControlNetModel(
        down_block_types=blocks, attention_head_dim=2, conditioning_embedding_out_channels=(4, 8), **sizes
    )
    network.save_pretrained(tmp_path / "control")
    with pytest.raises(InputError, match="one network .ControlNetModel."):
        require_base(str(tmp_path / "control"))
    (tmp_path / "lora").mkdir()
    save_file({"unet.x": torch.ones(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="an adapter: give the folder of the model"):
        require_base(str(tmp_path / "lora"))
    with pytest.raises(InputError, match="from_single_file"):
        require_base(str(tmp_path / "v1-5-pruned.safetensors"))
    with pytest.raises(InputError, match="python -m jobs.import_base"):
        require_base("stable-diffusion-v1-5/stable-diffusion-v1-5")
    with pytest.raises(InputError, match="found nothing; give another path"):
        require_base(str(tmp_path / "nowhere"))


def test_the_files_that_count_are_those_that_diffusers_reads(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["sd15"], folder)
    for name in ("diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        (folder / "unet" / name).write_bytes(b"never read")
    require_base(str(folder))
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet", max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    base = require_base(str(folder))
    again = base.family.load(folder).unet.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())
    assert json.loads((folder / INDEX).read_text())["_class_name"] == "StableDiffusionPipeline"
