"""Model folders by path or URI: where they lie, what is in them, and as local directories that `from_pretrained` reads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from emu_ray.errors import StationMissingError
from emu_ray.stations.manifest import MANIFEST_FILE
from emu_ray.stations.station import Station
from emu_ray.stations.store import said_plainly

READ_CHUNK_BYTES = 1 << 24
BASE_VARIABLE = "EMU_RAY_BASE"  # another base than the shipped one, for every process of a run


def base_folder() -> Path:
    """The demo's base: the package's own weights, or the folder that EMU_RAY_BASE names."""
    return Path(os.environ.get(BASE_VARIABLE) or Path(__file__).resolve().parents[1] / "base" / "weights")


def resolve(address: str, root: str) -> str:
    """`address` with a leading `ROOT` replaced by the run's root, `BASE` by the shipped base; a local folder becomes absolute.

    Anything else, such as a hub's name, stays as it is. Call it on the driver: workers have another working directory.
    """
    head, slash, rest = address.partition("/")
    places = {"ROOT": root, "BASE": str(base_folder())}
    if head in places:
        return f"{places[head]}{slash}{rest}"
    return str(Path(address).resolve()) if Path(address).exists() else address


def local_folder(address: str) -> Path:
    """`address` itself when it is a local directory, else a copy of the s3:// folder, made once a machine and whole or not at all.

    Raises StationMissingError when there is nothing.
    """
    if "://" not in address:
        if not Path(address).is_dir():
            raise StationMissingError(
                f"the folder {address} doesn't exist: run the job that writes it, or give another path"
            )
        return Path(address)
    kept = Path(tempfile.gettempdir()) / f"emu_ray-{os.getuid()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    copy = kept / content_fingerprint(address)
    if not copy.is_dir():
        half = Path(tempfile.mkdtemp(dir=kept, prefix=f"{copy.name}-"))
        try:
            Station(address).download("", half)
            with contextlib.suppress(OSError):  # another process of this machine was first: its copy is as good
                half.rename(copy)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return copy


def content_fingerprint(address: str) -> str:
    """16 hex digits of what a folder holds: a station's manifest, or the bytes of every file.

    Raises StationMissingError when there is nothing, StationHalfWrittenError for a station that isn't finished.
    """
    station = Station(address)
    names = station.store.sizes()
    if not names:
        raise StationMissingError(
            f"the folder {address} doesn't exist: run the job that writes it, or give another path"
        )
    if MANIFEST_FILE in names or "_started.json" in names:
        return station.require().fingerprint
    digest = hashlib.sha256()
    system, base = station.filesystem()
    for name in sorted(names):
        digest.update(f"{name}\0".encode())
        with (
            said_plainly("read", station.path(name)),
            system.open_input_stream(f"{base}/{name}", compression=None) as stream,
        ):
            while chunk := stream.read(READ_CHUNK_BYTES):  # a published U-Net is one file of 10 GB
                digest.update(chunk)
    return digest.hexdigest()[:16]
