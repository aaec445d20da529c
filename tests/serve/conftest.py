"""One small served model, and one server of it under two names, for each module that asks for them."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The smallest pipeline, said to have been trained at 64 px."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    return str(folder)


@pytest.fixture(scope="module")
def address(ray_local: None, model: str) -> Iterator[str]:
    """Of a server whose models `tuned` and `base` are the same one."""
    from ray import serve as ray_serve

    from serve.app import ServeArgs
    from serve.deploy import deploy

    args = ServeArgs(checkpoint=model, base_checkpoint=model, num_cpus=0.2)
    yield deploy(args, port=_free_port())
    ray_serve.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
