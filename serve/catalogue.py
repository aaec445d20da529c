"""What is known of each served model before any of them is loaded: from its folder's JSON, its manifest, and the report of its evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu_ray.errors import InputError
from emu_ray.stations import Station
from emu_ray.stations.manifest import STARTED_FILE, Manifest
from serve.args import ServeArgs

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A name of the API: a whole model, or a LoRA of one."""

    name: str
    whole: str  # the name of the model that is loaded for it, its own unless it is a LoRA
    checkpoint: str  # of that model
    lora: str | None  # its adapter's folder
    scale: float
    size_px: int | None  # the side at which the model was trained; None where its folder doesn't say
    most_steps: int
    lineage: dict[str, Any] | None  # None for a checkpoint that no job of ours wrote
    preference: dict[str, Any] | None

    def card(self) -> dict[str, Any]:
        """What v1/models tells."""
        return {
            "size_px": self.size_px,
            "most_steps": self.most_steps,
            "lora_of": None if self.lora is None else self.whole,
            "lineage": self.lineage,
            "preference": self.preference,
        }


def read_catalogue(args: ServeArgs) -> dict[str, ServedModel]:
    """The models by name, the default first.

    InputError when a checkpoint is no `diffusers` folder, StationHalfWrittenError when it is not finished.
    """
    whole = {name: _folder(uri, INDEX) for name, uri in args.checkpoints().items()}
    preferences = {} if args.evaluation is None else _preferences(args.evaluation)
    found = {
        name: ServedModel(
            name=name, whole=name, checkpoint=station.uri, lora=None, scale=1.0, size_px=_size_px(station), most_steps=_most_steps(station),
            lineage=_lineage(station), preference=preferences.get(name),
        )
        for name, station in whole.items()
    }  # fmt: skip
    for name, lora in args.loras.items():
        base, station = found[lora.base], _folder(lora.checkpoint, LORA_FILE)
        found[name] = ServedModel(
            name=name, whole=base.name, checkpoint=base.checkpoint, lora=station.uri, scale=lora.scale, size_px=base.size_px,
            most_steps=base.most_steps, lineage=_lineage(station), preference=preferences.get(name),
        )  # fmt: skip
    return found


def _folder(checkpoint: str, file: str) -> Station:
    station = Station(checkpoint if "://" in checkpoint else Path(checkpoint).expanduser().absolute())
    files = station.store.sizes()
    if STARTED_FILE in files:
        station.require()
    if file not in files:
        kind = "diffusers folder" if file == INDEX else "LoRA"
        raise InputError(f"expected a {kind} with {file} at {station.uri}, found none; train one first")
    return station


def _json(station: Station, name: str) -> dict[str, Any]:
    content = station.store.get(name)
    try:
        found = json.loads(content or b"{}")
    except ValueError as error:
        raise InputError(
            f"{station.path(name)}: expected JSON, found something else ({error}); fetch or write it anew"
        ) from error
    return found if isinstance(found, dict) else {}


def _size_px(station: Station) -> int | None:
    side = next(
        (found for part in DENOISERS if (found := _json(station, f"{part}/config.json").get("sample_size"))), None
    )
    vae = _json(station, "vae/config.json")
    if not isinstance(side, int) or "block_out_channels" not in vae:
        return None
    return int(side * 2 ** (len(vae["block_out_channels"]) - 1) * vae.get("space_to_depth", 1))


def _most_steps(station: Station) -> int:
    return int(_json(station, "scheduler/scheduler_config.json").get("num_train_timesteps") or 1000)


def _lineage(station: Station) -> dict[str, Any] | None:
    """Where a checkpoint of ours comes from: enough to find the run that made it."""
    manifest: Manifest | None = station.manifest()
    if manifest is None:
        return None
    told = ("steps", "best_step", "images_seen", "stop_reason", "pairs")
    return {
        "station": manifest.station,
        "fingerprint": manifest.fingerprint,
        "finished_at": manifest.finished_at,
        "inputs": manifest.inputs,
        **{name: manifest.extra[name] for name in told if name in manifest.extra},
    }


def _preferences(evaluation: str) -> dict[str, dict[str, Any]]:
    """Of the model that was judged; by the name that its samples had, which is its name here too."""
    manifest = Station(evaluation).require("evaluation")
    first, second = manifest.recipe["first"], manifest.recipe["second"]
    appeal = manifest.extra["appeal"]
    shares = {name: round(appeal[name], 1) for name in ("win", "tie", "lose")}
    interval = [round(share, 1) for share in appeal["ci95"]]
    return {second: {"against": first, "by": "appeal judge", **shares, "ci95": interval, "n_pairs": appeal["n_pairs"]}}
