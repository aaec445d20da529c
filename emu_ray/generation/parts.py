"""One part of a pipeline's folder, from safetensors to float32: a network of diffusers or transformers."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from emu_ray.errors import InputError, first_line
from emu_ray.generation.weight_headers import stored_variant, weights_stem


def read_part(cls: Any, folder: Path) -> Any:
    """The network of class `cls` in `folder`, in eval mode; InputError when its weights are absent, corrupt or don't fit its config.

    Only safetensors are read: a pickle (`.bin`) could run code.
    """
    variant = stored_variant({file.name for file in folder.glob("*")}, weights_stem(folder.name))
    dtype = "torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"
    options = {dtype: torch.float32, "use_safetensors": True, "output_loading_info": True, "local_files_only": True}
    try:
        network, found = cls.from_pretrained(str(folder), variant=variant or None, **options)
    except Exception as error:  # diffusers, transformers, safetensors and torch each raise their own
        raise InputError(
            f"can't load the {cls.__name__} of {folder}: {first_line(error)[:300]}; fetch or write it anew"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{folder}: its weights don't fit its config.json: {len(missing)} are missing (e.g. {missing[0]}); fetch or write it anew"
        )
    return network.eval()


def read_part_unless(without: Collection[str], cls: Any, folder: Path) -> Any:
    """None for a part that isn't wanted, else `read_part`."""
    return None if folder.name in without else read_part(cls, folder)


def files_read(folder: Path) -> list[Path]:
    """What of a part's folder is read: configs, vocabularies and one variant of the weights; no pickles, no other frameworks' files."""
    stem = weights_stem(folder.name)
    variant = stored_variant({file.name for file in folder.iterdir()}, stem)
    weights = re.compile(
        rf"{stem}({'.fp16' if variant else ''})?(-\d+-of-\d+)?({'.fp16' if variant else ''})?\.safetensors"
    )
    found = []
    for file in sorted(folder.iterdir()):
        is_text = file.suffix in (".json", ".txt", ".model") and (".fp16" not in file.name or variant == "fp16")
        if file.is_file() and (is_text or weights.fullmatch(file.name)):
            found.append(file)
    return found
