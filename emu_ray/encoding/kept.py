"""Which rows of a pool the selection keeps: sorted keys, which are searched. A hash table would be built anew for each slice."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emu_ray.stations import Station


def kept_keys(selection: Station, reasons: tuple[str, ...]) -> np.ndarray:
    """(N,) int64, ascending: the keys whose reject reason is one of these."""
    table = selection.read_table(["key", "reject_reason"])
    return np.sort(table.filter(pc.is_in(table["reject_reason"], pa.array(reasons, pa.string())))["key"].to_numpy())


def is_kept(keys: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(N,) bool: which of the keys are among the ascending `kept`."""
    if not len(kept):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(kept, keys), len(kept) - 1)
    return kept[at] == keys
