"""Conversion of Python values to Arrow arrays without loss."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa


def exact_array(values: list[Any]) -> pa.Array:
    """Return *values* as an Arrow array of the type that Arrow infers, with nanoseconds if a value has them.

    Raises
    ------
    pyarrow.ArrowException
        The values have no common type, or Arrow's type would change one of them; see `exact_type`.

    Examples
    --------
    >>> exact_array([1, 2.5]).type
    DataType(double)
    """
    try:
        array = pa.array(values)
    except OverflowError:
        return pa.array(values, pa.uint64())
    kind = exact_type(values, array.type)
    return array if kind == array.type else pa.array(values, kind)


def exact_type(values: Iterable[Any], kind: pa.DataType) -> pa.DataType:
    """Return *kind*, the type that Arrow infers for *values*, in the unit that holds their times exactly.

    Arrow uses the type of the first value, and converts the others without an error: a datetime after a date loses its
    time, a datetime with a time zone among those without one is shifted, a number after a timedelta becomes a
    timedelta, text among bytes becomes bytes. The values of lists and structs are checked too.

    Raises
    ------
    pyarrow.ArrowTypeError
        A value would be changed.
    """
    if pa.types.is_struct(kind):
        held = [value for value in values if isinstance(value, Mapping)]
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([f.with_type(exact_type([value.get(f.name) for value in held], f.type)) for f in fields])
    if pa.types.is_list(kind):
        inside = kind.value_type
        if not (pa.types.is_nested(inside) or _converts(inside)):
            return kind
        items = list(itertools.chain.from_iterable(value for value in values if value is not None))
        return pa.list_(kind.value_field.with_type(exact_type(items, inside)))
    if not (_converts(kind) or pa.types.is_integer(kind)):
        return kind
    held = [value for value in values if value is not None and not isinstance(value, pa.Scalar)]
    families = {_family(value) for value in held if value == value}  # NaT, which differs from itself, is null
    if len(families) > 1:
        raise pa.ArrowTypeError(f"values of different types: {', '.join(sorted(families))}")
    if pa.types.is_timestamp(kind) and any(getattr(value, "nanosecond", 0) for value in held):
        return pa.timestamp("ns", kind.tz)
    if pa.types.is_duration(kind) and any(getattr(value, "nanoseconds", 0) for value in held):
        return pa.duration("ns")
    return kind


def _converts(kind: pa.DataType) -> bool:
    """Return True if Arrow converts values of other types to this one without an error."""
    return bool(pa.types.is_temporal(kind) or pa.types.is_binary(kind) or pa.types.is_string(kind))


def _family(value: Any) -> str:
    """Return the name of the Arrow types that hold a value exactly."""
    if isinstance(value, np.datetime64):
        return "date" if np.datetime_data(value)[0] == "D" else "datetime"
    if isinstance(value, datetime.datetime):
        return "datetime" if value.tzinfo is None else "datetime with a time zone"
    if isinstance(value, datetime.date | datetime.time):
        return "date" if isinstance(value, datetime.date) else "time"
    if isinstance(value, datetime.timedelta | np.timedelta64):
        return "duration"
    if isinstance(value, str):
        return "text"
    return "bytes" if isinstance(value, bytes | bytearray | memoryview) else "number"
