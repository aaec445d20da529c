"""Pictures read as training needs them and encoded on the way: which rows of a pool, of which bucket, and by what. No Ray here."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emu_ray.encoding.buckets import name_of
from emu_ray.encoding.encoder import LatentEncoder, fit
from emu_ray.encoding.encoder import decode as upright
from emu_ray.encoding.kept import is_kept, kept_keys
from emu_ray.errors import InputError
from emu_ray.models.autoencoder import load_autoencoder
from emu_ray.pictures.decode import decode
from emu_ray.records import ORIGIN
from emu_ray.stations import Station
from emu_ray.stations.store import said_plainly
from emu_ray.training.reconstruction import is_held_out
from emu_ray.training.streaming.order import OnTheFly, RowGroups

COLUMNS = ["key", "image", "caption"]


def picture_groups(root: str, recipe: OnTheFly, held_out_every: int | None = None) -> dict[str, RowGroups]:
    """Row groups of the source by bucket, each with the rows that are kept, have a caption and aren't held out; InputError when none is.

    A row's bucket is that of its header's size; of a source without one, `chosen`, the headers are read.
    """
    source = Station(f"{root}/{recipe.source}")
    source.require(recipe.source)
    kept = _kept(root, recipe)
    system, base = source.filesystem()
    found: dict[str, RowGroups] = {}
    for uri in source.parquet_files():
        name = uri.removeprefix(f"{source.uri}/")
        with said_plainly("read", uri):
            file = pq.ParquetFile(f"{base}/{name}", filesystem=system)
            sized = {"width_px", "height_px"} <= set(file.schema_arrow.names)
            for group in range(file.num_row_groups):
                table = file.read_row_group(
                    group, columns=["key", "caption", *(("width_px", "height_px") if sized else ("image",))]
                )
                if held_out_every is not None:
                    left = ~is_held_out(table["key"].to_numpy(), held_out_every)
                    table = table.set_column(
                        table.column_names.index("caption"), "caption", pc.if_else(pa.array(left), table["caption"], "")
                    )
                for bucket, rows in _by_bucket(table, kept, recipe, sized).items():
                    found.setdefault(bucket, RowGroups()).add(name, group, len(rows), rows)
    if not found:
        raise InputError(f"no picture of {source.uri} is left to train on: look at the reasons in {root}/selection")
    return found


def _kept(root: str, recipe: OnTheFly) -> np.ndarray | None:
    if recipe.source != "pool" or recipe.keep_reasons is None:
        return None
    selection = Station(f"{root}/selection")
    selection.require("selection")
    return kept_keys(selection, recipe.keep_reasons)


def _by_bucket(table: pa.Table, kept: np.ndarray | None, recipe: OnTheFly, sized: bool) -> dict[str, np.ndarray]:
    wanted = pc.not_equal(table["caption"], "").to_numpy(zero_copy_only=False)
    if kept is not None:
        wanted = wanted & is_kept(table["key"].to_numpy(), kept)
    rows = np.flatnonzero(wanted)
    width, height = _sizes(table, rows, sized)
    known = (width > 0) & (height > 0)
    rows, ratio = rows[known], np.log(width[known] / height[known])
    each = np.log([size[0] / size[1] for size in recipe.sizes])
    nearest = np.abs(ratio[:, None] - each[None]).argmin(1)  # as buckets.nearest
    return {name_of(recipe.sizes[i]): rows[nearest == i].astype(np.int32) for i in np.unique(nearest)}


def _sizes(table: pa.Table, rows: np.ndarray, sized: bool) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of these rows' pictures in pixels, 0 where none can be told."""
    if sized:
        width, height = (table[name].fill_null(0).to_numpy()[rows] for name in ("width_px", "height_px"))
        return width, height
    shapes = [
        None if (pixels := decode(table["image"][int(row)].as_py()).pixels) is None else pixels.shape for row in rows
    ]
    return (np.array([0 if shape is None else shape[side] for shape in shapes]) for side in (1, 0))  # type: ignore[return-value]


class WindowFitter:
    """A function for Ray Data: takes `key` and `image`; gives `key` and `pixels` (bytes of (size, size, 3) uint8), row for row."""

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Scaled to cover the square, and cropped in the middle; InputError for a picture that can't be decoded."""
        size = (self.size_px, self.size_px)
        pictures = zip(rows["image"].to_pylist(), rows["key"].to_pylist(), strict=True)
        pixels = [fit(upright(encoded, key), size).pixels.tobytes() for encoded, key in pictures]
        return pa.table({"key": rows["key"], "pixels": pa.array(pixels, pa.binary())})


class WindowEncoder:
    """A class for Ray Data: takes `key`, `image`, `caption` and `window_bucket`; gives `key`, `caption`, `latent_mean` and `records.ORIGIN`, row for row."""

    def __init__(self, autoencoder: str, recipe: OnTheFly) -> None:
        """Loads the autoencoder from its folder, once."""
        self.recipe = recipe
        network = load_autoencoder(autoencoder).to("cuda" if recipe.gpus_each else "cpu")
        self.encoders = {name_of(size): LatentEncoder(network, [size], keeps_std=False) for size in recipe.sizes}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A block of any windows; every picture goes to the bucket that its window is of."""
        parts, start = [], 0
        buckets = rows["window_bucket"].to_pylist()
        while start < len(rows):
            end = start + 1
            while end < len(rows) and buckets[end] == buckets[start] and end - start < self.recipe.batch_size:
                end += 1
            parts.append(self._encode(rows.slice(start, end - start), buckets[start]))
            start = end
        return pa.concat_tables(parts)

    def _encode(self, rows: pa.Table, bucket: str) -> pa.Table:
        columns = self.encoders[bucket]({name: np.array(rows[name].to_pylist(), dtype=object) for name in COLUMNS})
        return pa.table(
            {
                "key": pa.array(list(columns["key"]), pa.int64()),
                "caption": pa.array(list(columns["caption"]), pa.string()),
                "latent_mean": pa.array(list(columns["latent_mean"]), pa.list_(pa.float16())),
                **{name: pa.array(list(columns[name]), pa.int32()) for name in ORIGIN},
            }
        )
