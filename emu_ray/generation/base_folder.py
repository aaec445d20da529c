"""Whether a folder is a model that we can start from: judged by its JSON and the headers of its weights, before any GPU is taken.

Reads folders here and on s3://. Nothing found in a folder is run: classes are named by us, and only safetensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from emu_ray.diffusion.schedule import ScheduleRecipe, schedule_of
from emu_ray.errors import InputError
from emu_ray.generation.families import EMU, FAMILIES, Family
from emu_ray.generation.schedulers import scheduler_from
from emu_ray.generation.weight_headers import Shapes, require_weights
from emu_ray.models.denoiser import TIME_IDS
from emu_ray.stations import Station

INDEX = "model_index.json"
WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
SUPPORTED = "ours, StableDiffusionPipeline (1.x, 2.x) and StableDiffusionXLPipeline (base)"


@dataclass(frozen=True)
class BaseFolder:
    """What is known of a base without its weights."""

    address: str
    family: Family
    configs: Mapping[str, Mapping[str, Any]]  # part -> its JSON
    schedule: ScheduleRecipe  # what its scheduler means for training


def require_base(address: str, without: Collection[str] = ()) -> BaseFolder:
    """The base in this folder, local or s3://; InputError in one sentence for any other. Parts in `without` need not be there.

    A folder without model_index.json passes as parts of ours only where no U-Net is asked for, as `jobs.text_encoders` writes it.
    """
    station = _station(address)
    names = set(station.store.sizes())
    if INDEX not in names and "unet" in without:
        family: Family = EMU
        index: dict[str, Any] = {}
    else:
        index = _index(station, names)
        family = _family(index, station.path(INDEX))
        _require_named_parts(family, index, station.path(INDEX), without)
    configs = {
        part: _json(station, f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json", names)
        for part in family.parts
        if part not in without and not part.startswith("tokenizer")
    }
    for part, classes in family.parts.items():
        if part in configs and part in ("vae", "unet", "scheduler") and configs[part].get("_class_name") not in classes:
            raise InputError(
                f"{station.path(part)}: expected a {' or '.join(sorted(classes))}, found {configs[part].get('_class_name')!r}: "
                "such a base is not supported"
            )
        if part.startswith("tokenizer") and not _has_tokenizer(names, part):
            raise InputError(
                f"{station.path(part)}: expected tokenizer.json, or vocab.json and merges.txt, found neither: fetch it anew"
            )
    where = station.path("scheduler/scheduler_config.json")
    schedule = schedule_of(scheduler_from(configs["scheduler"], where).config, where)
    wanted = None
    if "unet" in configs:
        _require_unet(family, configs, station.uri)
        wanted = _shapes(configs["unet"])
    present = {name.split("/")[0] for name in names if "/" in name}
    listed = {part for part in family.optional_parts & present if (index.get(part) or [None])[0] is not None}
    for part in sorted({*configs, *listed}.difference(WITHOUT_WEIGHTS)):
        require_weights(station, part, wanted if part == "unet" else None)
    return BaseFolder(station.uri, family, configs, schedule)


def _station(address: str) -> Station:
    if address.endswith((".safetensors", ".ckpt", ".bin", ".pt")):
        raise InputError(
            f"{address}: expected a diffusers folder, found the name of a single file: convert it with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) and give the folder"
        )
    station = Station(address)
    if not station.store.sizes():
        hub = (
            ": for a model of the hub run `python -m jobs.import_base` first"
            if address.count("/") == 1 and not Path(address).exists()
            else ""
        )
        raise InputError(
            f"{address}: expected a diffusers folder with a model_index.json, found nothing{hub or '; give another path'}"
        )
    return station


def _index(station: Station, names: set[str]) -> dict[str, Any]:
    if INDEX in names:
        return _json(station, INDEX, names)
    found = "no model_index.json: it is half-written, or no pipeline"
    if "config.json" in names:
        found = f"one network ({_json(station, 'config.json', names).get('_class_name')}), such as a ControlNet or an autoencoder"
    elif "pytorch_lora_weights.safetensors" in names or "adapter_config.json" in names:
        found = "an adapter: give the folder of the model that it was trained on"
    raise InputError(f"{station.uri}: expected the folder of a whole pipeline ({SUPPORTED}), found {found}")


def _family(index: Mapping[str, Any], where: str) -> Family:
    named = index.get("_class_name")
    name = str(named[-1] if isinstance(named, list) and named else named)
    if name not in FAMILIES:
        raise InputError(
            f"{where}: expected the pipeline of one of {SUPPORTED}, found {name!r}: such a base is not supported"
        )
    if index.get("requires_aesthetics_score"):
        raise InputError(
            f"{where}: expected SDXL's base model, found a refiner (requires_aesthetics_score): give the base's folder"
        )
    return FAMILIES[name]


def _require_named_parts(family: Family, index: Mapping[str, Any], where: str, without: Collection[str]) -> None:
    """Each part that is loaded has a class that the family knows; nothing unknown takes part."""
    for part, classes in family.parts.items():
        if part in without:
            continue
        named = index.get(part)
        name = named[1] if isinstance(named, list) and len(named) == 2 else None
        if name is None or (classes and name not in classes):
            raise InputError(
                f"{where}: expected {part} to be a {' or '.join(sorted(classes)) or 'tokenizer'}, found {named!r}: "
                "such a base is not supported"
            )
    parts = {part for part, named in index.items() if isinstance(named, list) and not part.startswith("_")}
    if unknown := sorted(parts - set(family.parts) - family.optional_parts):
        raise InputError(
            f"{where}: expected the parts {', '.join(family.parts)}, found also {unknown[0]!r}: such a base is not supported"
        )


def _has_tokenizer(names: set[str], part: str) -> bool:
    return (
        f"{part}/tokenizer.json" in names
        or {f"{part}/vocab.json", f"{part}/merges.txt"} <= names
        or f"{part}/spiece.model" in names
    )


def _json(station: Station, name: str, names: set[str]) -> dict[str, Any]:
    if name not in names:
        raise InputError(
            f"{station.uri}: expected {name} in it, found none: the folder is half-written; fetch or write it anew"
        )
    try:
        found = json.loads(station.get_bytes(name))
    except ValueError as error:
        raise InputError(
            f"{station.path(name)}: expected JSON, found something else ({error}); fetch or write it anew"
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{station.path(name)}: expected a JSON object, found {type(found).__name__}; fetch or write it anew"
        )
    return found


def _require_unet(family: Family, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """The U-Net predicts what it reads, from the features that the text encoders give, and is told nothing else."""
    unet = configs["unet"]
    if unet["in_channels"] != unet["out_channels"]:
        kind = {9: ": an inpainting model", 8: ": a model that edits or upscales pictures"}.get(unet["in_channels"], "")
        raise InputError(
            f"{where}/unet: expected as many channels in as out, found {unet['in_channels']} and {unet['out_channels']}{kind}; "
            "give a text-to-image model"
        )
    told, micro = unet.get("addition_embed_type"), family.micro_conditioning
    if told not in (None, "text_time") or (micro is not None and (told == "text_time") != micro):
        raise InputError(
            f"{where}/unet: expected addition_embed_type {'text_time' if micro else None}, found {told!r}: such a base is not supported"
        )
    for name in ("class_embed_type", "time_cond_proj_dim", "num_class_embeds"):
        if unet.get(name) is not None:
            raise InputError(
                f"{where}/unet: expected no {name}, found {unet[name]!r} (a distilled or class-conditional model): not supported"
            )
    tokens, pooled = family.widths(configs)
    reads = unet["encoder_hid_dim"] if unet.get("encoder_hid_dim_type") == "text_proj" else unet["cross_attention_dim"]
    if reads != tokens:
        raise InputError(
            f"{where}/unet: reads text features of width {reads}, its text encoders give {tokens}; fetch it anew"
        )
    if told == "text_time":
        asked = unet["projection_class_embeddings_input_dim"] - TIME_IDS * unet["addition_time_embed_dim"]
        if asked != pooled:
            raise InputError(
                f"{where}/unet: expected {TIME_IDS} time ids beside pooled text of width {pooled}, found room for {asked}: a refiner, or another model"
            )


def _shapes(config: Mapping[str, Any]) -> Shapes:
    """Name -> shape of all weights that a U-Net of this config has."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(dict(config))
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
