"""Windows read by Ray Data: in tasks of its own, ahead of the step, through a streaming split so that its executor doesn't share the trainer's process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from emu_ray.stations import Station
from emu_ray.stations.packed import OnPacked, packed, unpacked
from emu_ray.stations.store import said_plainly
from emu_ray.training.streaming.order import OnTheFly, RowGroup, StreamOrder, StreamRecipe, Window
from emu_ray.training.streaming.pictures import WindowEncoder, WindowFitter

WINDOWS_A_DATASET = (
    256  # Ray Data plans each block: a run of a billion pictures is read by many datasets, one after another
)
A_WINDOW: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1, "zero_copy_batch": True}  # a row is a window
Stage = Callable[[ray.data.Dataset], ray.data.Dataset]  # of packed tables


def encoded(autoencoder: str, how: OnTheFly) -> Stage:
    """Pictures to latents, in actors that hold the autoencoder."""
    return lambda dataset: dataset.map_batches(
        OnPacked,
        fn_constructor_args=(WindowEncoder, autoencoder, how),
        **A_WINDOW,
        num_cpus=how.cpus_each,
        num_gpus=how.gpus_each,
        compute=ActorPoolStrategy(size=how.actors),
    )


def fitted(size_px: int, readers: int) -> Stage:
    """Pictures to squares of pixels, in tasks."""
    return lambda dataset: dataset.map_batches(
        OnPacked(WindowFitter, size_px), **A_WINDOW, num_cpus=0, compute=TaskPoolStrategy(size=readers)
    )


class RayReader:
    """Windows to their rows, mixed. Reading waits for disks and networks: its tasks ask for no CPU, of which the trainers may hold all."""

    def __init__(
        self,
        station: Station,
        order: StreamOrder,
        columns: list[str],
        recipe: StreamRecipe,
        then: Stage | None = None,
    ) -> None:
        """`then` makes of the rows what training takes, row for row."""
        self.order, self.recipe, self.then = order, recipe, then
        self._reader = WindowReader(station, columns)

    def __call__(self, windows: Iterator[Window]) -> Iterator[pa.Table]:
        """The windows' rows, in their order."""
        while some := list(itertools.islice(windows, WINDOWS_A_DATASET)):
            items = [self._item(window) for window in some]
            dataset: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
            dataset.context.execution_options.preserve_order = True
            dataset.context.enable_progress_bars = False
            reader = self._reader
            dataset = dataset.map_batches(
                lambda items: packed(reader(items)),  # noqa: B023 (of one item)
                **A_WINDOW,
                num_cpus=0,
                compute=TaskPoolStrategy(size=self.recipe.readers),
            )
            if self.then is not None:
                dataset = self.then(dataset)
            (rows,) = dataset.streaming_split(1)
            windows_of: Any = rows.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=2)  # type: ignore[arg-type]
            yield from map(unpacked, windows_of)

    def _item(self, window: Window) -> dict[str, object]:
        groups = self.order.row_groups(window)
        return {
            "files": [group.file for group in groups],
            "groups": [group.group for group in groups],
            "chosen": [None if group.chosen is None else group.chosen.tolist() for group in groups],
            "order": self.order.mixed(window).tolist(),
            "bucket": window.bucket,
        }


class WindowReader:
    """A function for Ray Data: one item of row groups in, their rows in the item's order out."""

    def __init__(self, station: Station, columns: list[str]) -> None:
        self.station, self.columns = station, columns

    def __call__(self, items: pa.Table) -> pa.Table:
        """Reads the row groups; StationError when one can't be read."""
        tables = [self._window(item) for item in items.to_pylist()]
        return pa.concat_tables(tables)

    def _window(self, item: dict[str, Any]) -> pa.Table:
        wanted = zip(item["files"], item["groups"], item["chosen"], strict=True)
        groups = [
            RowGroup(name, group, 0, None if chosen is None else np.array(chosen)) for name, group, chosen in wanted
        ]
        rows = pa.concat_tables([read_group(self.station, group, self.columns) for group in groups]).take(
            np.array(item["order"])
        )
        return rows.append_column("window_bucket", pa.array([item["bucket"]] * len(rows), pa.string()))


def read_group(station: Station, group: RowGroup, columns: list[str]) -> pa.Table:
    """The rows of a group; StationError when the file can't be read."""
    system, base = station.filesystem()
    with said_plainly("read", station.path(group.file)):
        found = pq.ParquetFile(f"{base}/{group.file}", filesystem=system).read_row_group(group.group, columns=columns)
    return found if group.chosen is None else found.take(group.chosen)
