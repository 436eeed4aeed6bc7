"""Columns of documents that are dicts, as Arrow arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.documents.arrow_types import changed_families, label_cast, united
from flexcache.documents.roles import ONE_TYPE
from flexcache.documents.values import exact_array
from flexcache.errors import DocumentsError

_PYTHON = {str, int, float, bool, bytes, list, dict, type(None)}
_NOT_ARROW = (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError)


def record_column(values: list[Any], kind: pa.DataType | None, name: str, where: list[str]) -> pa.Array:
    """Return *values* as an Arrow array, or raise DocumentsError for the first value that does not fit."""
    try:
        return _safe(values, kind)
    except _NOT_ARROW as error:
        so_far = kind or pa.null()
        for value, place in zip(values, where):
            try:
                found = _safe([value], kind).type
            except _NOT_ARROW as reason:
                found_value = f"{type(value).__name__} {repr(value)[:60]}"
                if isinstance(reason, UnicodeError):
                    raise DocumentsError(
                        f"column {name!r} holds broken Unicode",
                        where=place,
                        expected="text that can be written as UTF-8",
                        found=found_value,
                        remedy="replace single surrogates: text.encode('utf-8', 'replace').decode()",
                    ) from reason
                mixed = kind is None and isinstance(value, list | tuple | dict)
                wrong = "values of different types, or of an unknown one" if mixed else "a value that does not fit"
                raise DocumentsError(
                    f"column {name!r} holds {wrong}",
                    where=place,
                    expected=str(kind or "a type that Arrow knows"),
                    found=found_value,
                    remedy="give it as text, or leave it out by flexcache.open_documents(…, labels=[…])",
                ) from reason
            so_far = joined_type(so_far, found, name, place)
        raise DocumentsError(
            f"column {name!r} has values of different types",
            where=where[0],
            found=str(error).splitlines()[0],
            remedy=ONE_TYPE,
        ) from error


def _safe(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    array = exact_array(values)  # given a type, Arrow would cut 1.5 to an integer without an error
    return array if kind is None else label_cast(array, kind)


def joined_type(one: pa.DataType, two: pa.DataType, name: str, where: str) -> pa.DataType:
    """Return a type that holds the values of both, or raise DocumentsError for types that Arrow would convert."""
    try:
        if families := changed_families(one, two):
            raise pa.ArrowTypeError(" and ".join(families))
        return united(one, two)
    except pa.ArrowException as error:
        raise DocumentsError(
            f"column {name!r} changes its type",
            where=where,
            expected=str(one),
            found=str(two),
            remedy=ONE_TYPE,
        ) from error


def plain_value(value: Any) -> Any:
    """Return a value of NumPy or pandas as a Python value, or unchanged if only Arrow holds it exactly.

    >>> plain_value(np.int16(5)), plain_value(np.datetime64("NaT")), plain_value(np.array([1, 2]))
    (5, None, [1, 2])
    """
    if type(value) in _PYTHON:
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    plain = value.tolist() if hasattr(value, "tolist") else value
    dates = getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m")
    if dates and not isinstance(plain, list) and np.isnat(value):
        return None
    return value if dates and "[ns]" in str(value.dtype) else plain  # Python would make whole numbers of nanoseconds
