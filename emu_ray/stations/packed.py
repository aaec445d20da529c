"""A table in one cell of another one: how Ray Data hands on whole tables where GPUs are asked for.

What shares a batch is decided by the files, so each call must get just one block; `map_batches` of Ray 2.60 gives whole blocks only to
functions that ask for no GPU (`batch_size=None`), and with a number of rows it joins blocks and cuts them anew. A block of one row it
leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

CELL = "table"


def packed(table: pa.Table) -> pa.Table:
    """One row with one cell, which holds the table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue()
    ends = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.table({CELL: pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, content])})


def unpacked(row: pa.Table) -> pa.Table:
    """The table that `packed` was given; it looks into the row's memory."""
    assert len(row) == 1, f"expected one packed table, found {len(row)}"
    return pa.ipc.open_stream(row[CELL][0].as_buffer()).read_all()


class OnPacked:
    """A class of functions of tables, as a class for Ray Data whose rows hold a table each: `batch_size=1`."""

    def __init__(self, made: Callable[..., Callable[[pa.Table], pa.Table]], *given: Any) -> None:
        """The function is `made(*given)`."""
        self.function = made(*given)

    def __call__(self, row: pa.Table) -> pa.Table:
        """One table."""
        return packed(self.function(unpacked(row)))
