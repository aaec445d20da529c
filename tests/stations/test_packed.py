"""Tables in cells: what goes in comes out, with no copy of its bytes, and Ray Data takes the pools that ask for GPUs."""

from __future__ import annotations

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
