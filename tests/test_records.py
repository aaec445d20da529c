"""Tables against the stations' schemas."""

from __future__ import annotations

import pyarrow as pa
import pytest

from emu_ray.errors import SchemaError
from emu_ray.records import NEVER_NULL, SCHEMAS, check_types, conform


def selection(**columns: pa.Array) -> pa.Table:
    fine = {
        "key": pa.array([1, 2]),
        "reject_reason": pa.array(["", "aspect"]),
        "rank": pa.array([0.5, None], pa.float32()),
    }
    return pa.table({**fine, **columns})


def test_casts_that_lose_nothing_are_made_and_other_columns_follow() -> None:
    table = selection(
        truth=pa.array(["a", "b"]),
        key=pa.array([1, 2], pa.int32()),
        reject_reason=pa.array(["", "aspect"], pa.large_string()),
        rank=pa.nulls(2),
    )
    found = conform(table.select(["truth", "rank", "key", "reject_reason"]), "selection")
    assert found.schema.equals(SCHEMAS["selection"].append(pa.field("truth", pa.string())))


def test_a_dictionary_column_of_captions_becomes_text() -> None:
    assert (
        conform(selection(reject_reason=pa.array(["", "x"]).dictionary_encode()), "selection")["reject_reason"].type
        == pa.string()
    )


def test_rays_tensor_column_becomes_a_list() -> None:
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(pa.array(range(6), pa.float32()).to_numpy().reshape(2, 3))
    scores = {f.name: pa.nulls(2, f.type) for f in SCHEMAS["scores"]}
    scores |= {"key": pa.array([1, 2]), "decode_error": pa.array(["", ""]), "gate_reason": pa.array(["", ""])}
    found = conform(pa.table({**scores, "embedding": tensor}), "scores")
    assert found["embedding"].to_pylist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (selection().drop_columns(["rank"]), "pool/x: expected column 'rank'"),
        (selection(key=pa.array(["a", "b"])), "'key'.*int64.*found string"),
        (selection(key=pa.array([0.5, 1.0])), "without loss"),
        (selection(reject_reason=pa.array([1, 2])), "'reject_reason'.*found int64"),
        (selection(key=pa.array([1, None])), "1 nulls in 2 rows"),
    ],
)
def test_a_wrong_table_is_named_with_its_column(table: pa.Table, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        conform(table, "selection", where="pool/x")


def test_an_unknown_schema_names_the_known_ones() -> None:
    with pytest.raises(SchemaError, match="pool, scores"):
        conform(selection(), "selections")


def test_every_column_that_may_not_be_null_exists() -> None:
    assert all(set(NEVER_NULL[name]) <= set(schema.names) for name, schema in SCHEMAS.items())


@pytest.mark.parametrize("schema_name", SCHEMAS)
def test_a_files_types_are_judged_without_its_rows(schema_name: str) -> None:
    check_types(SCHEMAS[schema_name], schema_name, "here")
    for field in SCHEMAS[schema_name]:
        wrong = pa.string() if not pa.types.is_string(field.type) else pa.int64()
        at = SCHEMAS[schema_name].get_field_index(field.name)
        with pytest.raises(SchemaError, match=f"here: expected column '{field.name}'"):
            check_types(SCHEMAS[schema_name].set(at, field.with_type(wrong)), schema_name, "here")
        with pytest.raises(SchemaError, match="found only"):
            check_types(SCHEMAS[schema_name].remove(at), schema_name, "here")
