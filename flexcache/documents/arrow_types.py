"""The Arrow types that a store keeps, and the conversion of all other types to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_LISTS: list[tuple[Callable[[pa.DataType], bool], Callable[[Any], pa.DataType]]] = [
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_),
    (pa.types.is_large_list_view, pa.large_list),
]


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a store keeps values of an Arrow type.

    Dictionaries and run-end-encoded values become plain values; views become strings, bytes and lists; structs without
    fields become null, since Parquet has no such structs. The same holds inside lists, structs and maps.

    >>> stored_type(pa.dictionary(pa.int8(), pa.string_view()))
    DataType(string)
    >>> stored_type(pa.struct([("a", pa.struct([]))]))
    StructType(struct<a: null>)
    """
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return stored_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if isinstance(kind, pa.BaseExtensionType):
        storage = stored_type(kind.storage_type)
        return kind if storage == kind.storage_type else storage
    if pa.types.is_struct(kind):
        fields = [field.with_type(stored_type(field.type)) for field in (kind.field(i) for i in range(kind.num_fields))]
        return pa.struct(fields) if fields else pa.null()
    if pa.types.is_map(kind):
        key, item = stored_type(kind.key_type), stored_type(kind.item_type)
        return kind if (key, item) == (kind.key_type, kind.item_type) else pa.map_(key, item)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_stored_values(kind), kind.list_size)
    for is_kind, list_of in _LISTS:
        if is_kind(kind):
            return list_of(_stored_values(kind))
    return kind


def stored_array(array: pa.Array) -> pa.Array:
    """Return the values of an array in their `stored_type`.

    This is not a cast: Arrow casts neither run-end-encoded values nor structs without fields, and list views with nulls
    to damaged lists.
    """
    kind, given = stored_type(array.type), array.type
    if kind == given:
        return array
    if pa.types.is_dictionary(given):
        return stored_array(array.dictionary_decode())
    if pa.types.is_run_end_encoded(given):
        return stored_array(pc.run_end_decode(array))
    if isinstance(given, pa.BaseExtensionType):
        return stored_array(array.storage)
    if pa.types.is_null(kind):
        return pa.nulls(len(array))
    if pa.types.is_struct(given):
        children = [stored_array(child) for child in array.flatten()]
        return pa.StructArray.from_arrays(
            children, fields=[kind.field(i) for i in range(kind.num_fields)], mask=array.is_null()
        )
    if pa.types.is_map(given):
        offsets = array.offsets.to_numpy()
        span = int(offsets[0]), int(offsets[-1] - offsets[0])
        keys, items = (stored_array(part.slice(*span)) for part in (array.keys, array.items))
        begins = pa.array((offsets - offsets[0]).astype(np.int32))
        return pa.MapArray.from_arrays(begins, keys, items, type=kind, mask=array.is_null())
    if pa.types.is_fixed_size_list(given):
        size = given.list_size
        values = stored_array(array.values.slice(array.offset * size, len(array) * size))
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=array.is_null())
    if any(is_kind(given) for is_kind, _ in _LISTS):
        offsets = np.append(0, np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy()))
        large = pa.types.is_large_list(kind)
        made = pa.LargeListArray if large else pa.ListArray
        begins = pa.array(offsets.astype(np.int64 if large else np.int32))
        return made.from_arrays(begins, stored_array(array.flatten()), type=kind, mask=array.is_null())
    return array.cast(kind)


def can_be_stored(kind: pa.DataType) -> bool:
    """Return True if Parquet has the type, and its values can be reordered."""
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([("values", kind)])).close()
        pa.nulls(0, kind).take(pa.array([], pa.int64()))
    except pa.ArrowException:
        return False
    return True


def has_null_type(kind: pa.DataType) -> bool:
    """Return True if the type, or a type inside it, is null."""
    if isinstance(kind, pa.BaseExtensionType):
        return False
    inside = [kind.field(i).type for i in range(kind.num_fields)]
    return pa.types.is_null(kind) or any(map(has_null_type, inside))


def united(one: pa.DataType, two: pa.DataType) -> pa.DataType:
    """Return a type that holds the values of both.

    Raises
    ------
    pyarrow.ArrowException
        There is none.
    """
    if {one, two} == {pa.int64(), pa.uint64()}:  # whole numbers, one of them above 2⁶³ − 1
        return pa.uint64()
    schemas = [pa.schema([("values", kind)]) for kind in (one, two)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def label_cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return labels in another type; unlike by a cast, numbers never become text, nor booleans numbers.

    Raises
    ------
    pyarrow.ArrowException
        A value does not fit.
    """
    if array.type == kind:
        return array
    if families := changed_families(array.type, kind):
        raise pa.ArrowTypeError(f"{' and '.join(families)} values")
    for is_kind in (pa.types.is_boolean, is_text):
        other = pa.types.is_null(array.type) or isinstance(kind, pa.BaseExtensionType)
        if is_kind(array.type) != is_kind(kind) and not other:
            raise pa.ArrowTypeError(f"{array.type} values")
    return array.cast(kind)


def changed_families(one: pa.DataType, two: pa.DataType) -> list[str]:
    """Return the two families of types that a cast from *one* to *two* would mix, or an empty list.

    Dates, datetimes with and without a time zone, times of the day, durations, text, bytes, booleans and numbers are
    families: Arrow casts many values from one to another without an error. Lists and structs are compared inside.

    >>> changed_families(pa.list_(pa.timestamp("us")), pa.list_(pa.date32()))
    ['datetime', 'date']
    """
    if any(pa.types.is_null(kind) or isinstance(kind, pa.BaseExtensionType) for kind in (one, two)):
        return []
    if pa.types.is_struct(one) and pa.types.is_struct(two):
        names = [one.field(index).name for index in range(one.num_fields)]
        pairs = [(one.field(name).type, two.field(name).type) for name in names if two.get_field_index(name) >= 0]
    elif one.num_fields == two.num_fields == 1:
        pairs = [(one.field(0).type, two.field(0).type)]
    else:
        families = [_family(one), _family(two)]
        return families if families[0] != families[1] else []
    return next(filter(None, (changed_families(*pair) for pair in pairs)), [])


def is_list(kind: pa.DataType) -> bool:
    """Return True for a stored type of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return True for a stored type of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _stored_values(kind: pa.DataType) -> pa.Field:
    return kind.value_field.with_type(stored_type(kind.value_type))


def _family(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "datetime" if kind.tz is None else "datetime with a time zone"
    families: dict[str, Callable[[pa.DataType], bool]] = {
        "date": pa.types.is_date,
        "time": pa.types.is_time,
        "duration": pa.types.is_duration,
        "text": is_text,
        "bytes": _is_bytes,
        "boolean": pa.types.is_boolean,
    }
    return next((name for name, is_kind in families.items() if is_kind(kind)), "number")


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
