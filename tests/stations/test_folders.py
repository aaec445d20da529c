"""Model folders on S3 become local ones, whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from emu_ray.errors import StationError
from emu_ray.stations import Station
from emu_ray.stations.folders import local_folder
from emu_ray.stations.store import Store


@pytest.fixture
def model(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    address = f"{s3.uri}/folders/{tmp_path.name}"
    for name in ("config.json", "unet/weights"):
        Station(address).put_file(name, name.encode())
    return address


def test_a_folder_on_s3_is_copied_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = local_folder(model)
    assert (copy / "unet" / "weights").read_bytes() == b"unet/weights"
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("downloaded twice"))
    assert local_folder(model) == copy


def test_an_interrupted_copy_is_never_taken_for_the_folder(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Store.download

    def broken(store: Store, name: str, local: Path) -> None:
        if name == "unet/weights":
            raise StationError("the network went away")
        whole(store, name, local)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "download", broken)
        with pytest.raises(StationError):
            local_folder(model)
    assert (local_folder(model) / "unet" / "weights").exists()
