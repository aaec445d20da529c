"""Where a published base comes from, and which of its files are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline

from emu_ray.errors import InputError, first_line
from emu_ray.generation.base_folder import INDEX
from emu_ray.generation.families import Family
from emu_ray.generation.parts import files_read
from emu_ray.models.hub import read_json
from emu_ray.stations.folders import READ_CHUNK_BYTES, local_folder


def base_folder_of(source: str) -> Path:
    """A local folder of `source`: a folder, an s3:// address, or a hub's name, of which safetensors alone are downloaded.

    Raises InputError when there is neither a folder nor such a model on a hub that this machine reaches.
    """
    if "://" in source or Path(source).exists():
        return local_folder(source)
    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True, trust_remote_code=False))
    except Exception as error:  # diffusers and the hub's client each raise their own
        raise InputError(
            f"{source} is neither a folder here nor a model that the hub gives ({first_line(error)[:200]}): give --source another"
        ) from error


def base_files(folder: Path, family: Family) -> dict[str, Path]:
    """Name inside the folder -> file, of the index and of every part that the index names."""
    index = read_json(folder / INDEX)
    parts = {part for part, named in index.items() if isinstance(named, list) and named[0] is not None}
    found = {INDEX: folder / INDEX}
    for part in sorted(parts & {*family.parts, *family.optional_parts}):
        found |= {f"{part}/{file.name}": file for file in files_read(folder / part)}
    return found


def digest_of(files: Mapping[str, Path]) -> str:
    """16 hex digits of what the files hold."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0".encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(READ_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:16]
