"""Rows of a Parquet file as Python holds them, whatever a column's values are: one bad value costs no row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The batch's rows, column name to value.

    Bytes in a column of text that are no UTF-8 become lone surrogates (as by "surrogateescape"); any other value that
    Python can't hold, such as a date after the year 9999, becomes its text or None.
    """
    columns = [_values(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except Exception:  # UnicodeDecodeError, OverflowError, and what an unknown time zone raises
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    if isinstance(scalar, (pa.DictionaryScalar, pa.ExtensionScalar)):
        return _value(scalar.value) if scalar.is_valid else None
    if isinstance(scalar, pa.StructScalar) and scalar.is_valid:
        return {name: _value(inner) for name, inner in scalar.items()}
    if isinstance(scalar, pa.ListScalar) and scalar.is_valid:
        return [_value(inner) for inner in scalar.values]
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except Exception:
        return _as_text(scalar)


def _as_text(scalar: Any) -> str | None:
    try:
        return str(scalar.cast(pa.string()).as_py())
    except Exception:
        return None
