"""What the tests of the service share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The smallest pipeline, said to have been trained at 64 px."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    return str(folder)
