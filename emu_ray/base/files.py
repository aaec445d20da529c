"""Where the shipped base lies: the small networks that the demo starts from."""

from __future__ import annotations

from pathlib import Path

from emu_ray.stations.folders import base_folder


def folder() -> Path:
    """The package's folder of weights: clip/, heads/ and what the trainings add; absent before `make base`."""
    return base_folder()
