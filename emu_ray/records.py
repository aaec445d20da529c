"""The columns of every station that is a table, as pyarrow schemas, and one function that checks a table against them.

What the columns mean is told in ARCHITECTURE.md; what may be null is told here. This file opens nothing.
"""

from __future__ import annotations

import pyarrow as pa

from emu_ray.errors import SchemaError

SCHEMAS: dict[str, pa.Schema] = {
    "pool": pa.schema(
        [
            ("key", pa.int64()),
            ("image", pa.binary()),  # encoded bytes as found; b"" when there are none: `fetch_error` says why
            ("caption", pa.string()),  # "" when missing, empty or not UTF-8
            ("width_px", pa.int32()),  # null when the header can't be read or claims too many pixels
            ("height_px", pa.int32()),
            ("likes", pa.int64()),
            ("source", pa.string()),
        ]
    ),
    "scores": pa.schema(
        [
            ("key", pa.int64()),
            ("width_px", pa.int32()),
            ("height_px", pa.int32()),
            ("decode_error", pa.string()),  # "" = decoded
            ("offensive", pa.float32()),
            ("aesthetic", pa.float32()),
            ("clip_similarity", pa.float32()),
            ("embedding", pa.list_(pa.float32())),
            ("concept", pa.string()),
            ("phash", pa.string()),  # 16 hex digits
            ("text_words", pa.int32()),
            ("text_area", pa.float32()),
            ("gate_reason", pa.string()),  # "" = every scorer ran
        ]
    ),
    "selection": pa.schema([("key", pa.int64()), ("reject_reason", pa.string()), ("rank", pa.float64())]),
    "chosen": pa.schema(
        [
            ("key", pa.int64()),
            ("image", pa.binary()),
            ("caption", pa.string()),
            ("votes", pa.list_(pa.float32())),
            ("annotator", pa.string()),
        ]
    ),
    "latents": pa.schema(
        [
            ("key", pa.int64()),
            ("bucket", pa.string()),  # e.g. "1024x1024"
            ("latent_mean", pa.list_(pa.float16())),  # flat, channels first
            ("latent_std", pa.list_(pa.float16())),
            ("caption", pa.string()),
        ]
    ),
    "samples": pa.schema(
        [
            ("prompt_id", pa.int32()),
            ("prompt", pa.string()),
            ("seed", pa.int64()),
            ("image", pa.binary()),  # PNG
        ]
    ),
}

# Of `latents`, written since U-Nets are told sizes and crops; absent in stations made before. Crops count in pixels of the picture as it was
# scaled to cover its bucket (arXiv 2307.01952, section 2.2).
ORIGIN = ("original_width_px", "original_height_px", "crop_left_px", "crop_top_px")

NEVER_NULL: dict[str, tuple[str, ...]] = {
    "pool": ("key", "image", "caption"),
    "scores": ("key", "decode_error", "gate_reason"),
    "selection": ("key", "reject_reason"),
    "chosen": ("key", "image", "caption"),
    "latents": ("key", "bucket", "latent_mean", "caption"),
    "samples": ("prompt_id", "prompt", "seed", "image"),
}


def conform(table: pa.Table, schema_name: str, where: str = "this table") -> pa.Table:
    """`table` with the columns of `SCHEMAS[schema_name]` first, in its order and types, others after them.

    Casts that lose nothing are made (int32 to int64, large_string to string, Ray's tensor columns to lists); `where`
    names the file or station in the message. Raises SchemaError for an unknown schema, a missing column, another type,
    or a null that is not allowed.
    """
    schema = expected_schema(schema_name)
    columns: dict[str, pa.ChunkedArray] = {}
    for field in schema:
        if field.name not in table.column_names:
            raise SchemaError(
                f"{where}: expected column {field.name!r} ({field.type}) of a {schema_name!r} table, "
                f"found only {', '.join(map(repr, table.column_names)) or 'no columns'}"
            )
        columns[field.name] = _cast(table.column(field.name), field, schema_name, where)
    for name in NEVER_NULL[schema_name]:
        if columns[name].null_count:
            raise SchemaError(
                f"{where}: column {name!r} of a {schema_name!r} table may not be null, "
                f"found {columns[name].null_count} nulls in {len(columns[name])} rows"
            )
    columns.update((name, table.column(name)) for name in table.column_names if name not in columns)
    return pa.table(columns)


def check_types(found: pa.Schema, schema_name: str, where: str) -> None:
    """SchemaError when a file of columns `found` lacks one of `SCHEMAS[schema_name]` or has it in a type that `conform` can't cast."""
    for field in expected_schema(schema_name):
        at = found.get_field_index(field.name)
        if at < 0:
            raise SchemaError(
                f"{where}: expected column {field.name!r} ({field.type}) of a {schema_name!r} table, "
                f"found only {', '.join(map(repr, found.names)) or 'no columns'}"
            )
        if _kind(found.field(at).type) not in {_kind(field.type), "null"}:
            raise SchemaError(
                f"{where}: expected column {field.name!r} of a {schema_name!r} table to be {field.type}, found {found.field(at).type}"
            )


def _kind(found: pa.DataType) -> str:
    """The family within which a cast may lose nothing."""
    if isinstance(found, pa.BaseExtensionType):
        found = found.storage_type
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found):
        return f"list of {_kind(found.value_type)}"
    families = {
        "integer": pa.types.is_integer,
        "float": pa.types.is_floating,
        "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        "bytes": lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t),
    }
    return next((name for name, is_one in families.items() if is_one(found)), str(found))


def expected_schema(schema_name: str) -> pa.Schema:
    """The schema called `schema_name`; SchemaError names the known ones."""
    if schema_name not in SCHEMAS:
        raise SchemaError(f"expected one of the schemas {', '.join(SCHEMAS)}, found {schema_name!r}")
    return SCHEMAS[schema_name]


def _cast(column: pa.ChunkedArray, field: pa.Field, schema_name: str, where: str) -> pa.ChunkedArray:
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], type=column.type.storage_type)
    if column.type.equals(field.type):
        return column
    readable = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    if readable and not _is_text(column.type):
        raise _wrong_type(column, field, schema_name, where)
    try:
        return column.cast(field.type, safe=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _wrong_type(column, field, schema_name, where) from error


def _is_text(found: pa.DataType) -> bool:
    """Whether a cast to string only changes the storage: pyarrow would also turn numbers and bytes into text."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)


def _wrong_type(column: pa.ChunkedArray, field: pa.Field, schema_name: str, where: str) -> SchemaError:
    return SchemaError(
        f"{where}: expected column {field.name!r} of a {schema_name!r} table to be {field.type}, "
        f"found {column.type} that can't be cast without loss"
    )
