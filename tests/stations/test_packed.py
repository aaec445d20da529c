"""Tables in cells: what goes in comes out, and on Ray Data each call gets one of them, whatever their sizes."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from emu_ray.stations.packed import CELL, OnPacked, packed, unpacked

TABLE = pa.table({"key": [1, 2, 3], "image": [b"a", b"", b"c" * 100], "text": ["x", None, "z"]})


class _Doubled:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, table: pa.Table) -> pa.Table:
        return table.append_column(self.name, table["key"])


@pytest.mark.parametrize("table", [TABLE, TABLE.slice(1, 1), TABLE.slice(0, 0), pa.concat_tables([TABLE, TABLE])])
def test_a_table_comes_back(table: pa.Table) -> None:
    row = packed(table)
    assert (len(row), row.column_names) == (1, [CELL])
    assert unpacked(row).equals(table)


def test_a_class_of_functions_works_on_packed_tables() -> None:
    found = unpacked(OnPacked(_Doubled, "again")(packed(TABLE)))
    assert found["again"].to_pylist() == [1, 2, 3] and found.drop_columns(["again"]).equals(TABLE)


def test_two_rows_are_no_table() -> None:
    with pytest.raises(AssertionError, match="expected one packed table, found 2"):
        unpacked(pa.concat_tables([packed(TABLE)] * 2))


class _Counted:
    """Adds how many rows came in this call."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, table: pa.Table) -> pa.Table:
        return table.append_column(self.name, pa.array([len(table)] * len(table)))


@pytest.mark.usefixtures("ray_local")
def test_on_ray_data_each_call_gets_one_table() -> None:
    import ray

    sizes = [3, 1, 700, 2, 1, 40]
    how: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1, "num_cpus": 0.2, "compute": ray.data.ActorPoolStrategy(size=1)}  # fmt: skip
    rows = ray.data.from_items([{"size": size} for size in sizes], override_num_blocks=len(sizes))
    found = rows.map_batches(_made, batch_format="pyarrow", batch_size=1)
    for name in ("first", "second"):
        found = found.map_batches(OnPacked, fn_constructor_args=(_Counted, name), **how)
    batches: Any = found.iter_batches(batch_size=None, batch_format="pyarrow")
    tables = [unpacked(row) for row in batches]
    assert sorted(len(table) for table in tables) == sorted(sizes)
    for table in tables:
        assert set(table["first"].to_pylist()) == set(table["second"].to_pylist()) == {len(table)}


def _made(item: pa.Table) -> pa.Table:
    (size,) = item["size"].to_pylist()
    return packed(pa.table({"key": list(range(size))}))
