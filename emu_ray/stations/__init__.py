"""Stations: directories, local or on S3, of Parquet files or checkpoints, with a manifest that is written last."""

from emu_ray.stations.manifest import Manifest
from emu_ray.stations.station import Station
from emu_ray.stations.store import Store, open_filesystem

__all__ = ["Manifest", "Station", "Store", "open_filesystem"]
