"""Safetensors judged by their headers alone: whether files are whole, and which tensors they hold."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from emu_ray.errors import InputError
from emu_ray.stations import Station
from emu_ray.stations.store import said_plainly

Shapes = Mapping[str, tuple[int, ...]]
MAX_HEADER_BYTES = 100_000_000  # as safetensors itself


def require_weights(station: Station, part: str, wanted: Shapes | None) -> None:
    """InputError unless the folder `part` of `station` has all its safetensors, each whole, with the tensors `wanted` where given.

    A part whose only weights are a pickle is refused too: reading one could run code.
    """
    sizes = {
        name.removeprefix(f"{part}/"): size
        for name, size in station.store.sizes().items()
        if name.startswith(f"{part}/")
    }
    where = station.path(part)
    stem = weights_stem(part)
    variant = stored_variant(set(sizes), stem)
    if variant is None:
        if pickles := sorted(name for name in sizes if name.endswith((".bin", ".ckpt", ".pt", ".msgpack", ".h5"))):
            raise InputError(
                f"{where}: expected safetensors, found only {pickles[0]}, a format that can run code when it is read: where you trust it, "
                "write it anew with `pipeline.save_pretrained(FOLDER, safe_serialization=True)`"
            )
        raise InputError(f"{where}: expected {stem}.safetensors, found none: the folder is half-written; fetch it anew")
    files = [name for name in _single(stem, variant) if name in sizes]
    if not files:
        index = next(name for name in _indexes(stem, variant) if name in sizes)
        files = sorted(set(json.loads(station.get_bytes(f"{part}/{index}"))["weight_map"].values()))
        if missing := sorted(set(files) - set(sizes)):
            raise InputError(
                f"{where}: {index} names {missing[0]}, which is not there: the folder is half-written; fetch it anew"
            )
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        found.update(tensor_shapes(station, f"{part}/{name}", sizes[name]))
    for name, shape in (wanted or {}).items():
        if found.get(name) != shape:
            raise InputError(
                f"{where}: its weights don't fit its config.json: expected {name} of shape {shape}, found {found.get(name, 'none')}; fetch it anew"
            )


def weights_stem(part: str) -> str:
    """How diffusers and transformers call the weights of a pipeline's part."""
    return "diffusion_pytorch_model" if part in ("vae", "unet") else "model"


def stored_variant(names: Collection[str], stem: str) -> str | None:
    """Which of a part's safetensors are read: "" for the usual ones, "fp16" where there are only these, None where there is neither."""
    for variant in ("", "fp16"):
        if any(name in names for name in (*_single(stem, variant), *_indexes(stem, variant))):
            return variant
    return None


def _single(stem: str, variant: str) -> tuple[str, ...]:
    return (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors",)


def _indexes(stem: str, variant: str) -> tuple[str, ...]:
    """Both spellings that diffusers has had for the index of a variant's shards."""
    if not variant:
        return (f"{stem}.safetensors.index.json",)
    return f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors.index.json"


def tensor_shapes(station: Station, name: str, size: int) -> Shapes:
    """Name -> shape of every tensor of a safetensors file of `size` bytes; InputError when it is cut off or something else."""
    system, base = station.filesystem()
    with said_plainly("read", station.path(name)), system.open_input_file(f"{base}/{name}") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{station.path(name)}: expected a safetensors file, found something else; fetch it anew"
        ) from error
    if 8 + length + end != size:
        raise InputError(
            f"{station.path(name)}: expected {8 + length + end} bytes, found {size}: it is cut off; fetch it anew"
        )
    return shapes
