"""One small served model, and one server of it under two names, for each module that asks for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.client import free_port


@pytest.fixture(scope="session")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The smallest pipeline, said to have been trained at 64 px."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    return str(folder)


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes the votes of blind comparisons."""
    return tmp_path_factory.mktemp("votes") / "votes"


@pytest.fixture(scope="module")
def address(ray_local: None, model: str, votes: Path) -> Iterator[str]:
    """Of a server whose models `tuned` and `base` are the same one, with room for 8 requests that are drawn and 400 that wait."""
    from ray import serve as ray_serve

    from serve.args import ServeArgs
    from serve.deploy import deploy

    args = ServeArgs(
        checkpoint=model, base_checkpoint=model, votes=str(votes), num_cpus=0.2, max_together=8, max_waiting=400
    )
    yield deploy(args, port=free_port())
    ray_serve.shutdown()
