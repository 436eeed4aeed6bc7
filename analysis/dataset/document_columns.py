"""Convert columns of a documents table into targets and groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.dataset.readable import Task
from flexcache.errors import AnalysisError, nearest

_VALUE_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
)
LABEL_TYPES = (*_VALUE_TYPES, pa.types.is_temporal, pa.types.is_decimal)
"""Types of columns whose values can be compared."""

AS_REQUESTED = "as requested"
"""The reason for a task that the caller named."""


def read_column(
    table: pa.Table, name: str, role: str, kinds: Sequence[Callable[[pa.DataType], bool]] = _VALUE_TYPES
) -> pa.Array:
    """Return a column of text, numbers or booleans, or of other *kinds*; *role* names its use in errors."""
    if name not in table.column_names:
        raise AnalysisError(
            f"the documents have no column {name!r} ({role})",
            remedy=nearest(name, tuple(table.column_names)),
        )
    column = table[name].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not any(test(kind) for test in kinds):
        raise AnalysisError(
            f"column {name!r} cannot be a {role}",
            expected=f"text, numbers{', dates' if kinds is LABEL_TYPES else ''} or booleans, one per document",
            found=str(kind),
        )
    return column


def joined_labels(store: Any, columns: Iterable[Any]) -> dict[str, dict[str, str]]:
    """Return the checksum of the label table of each of *columns* that was joined, as an entry ``labels``, or nothing.

    Results that depend on a joined label keep it, since the label may be replaced. A target of `analysis.targets`
    among *columns* may read any label, so it stands for all of them.

    >>> joined_labels(None, ["label"])
    {}
    """
    names = [column for column in columns if column is not None]
    exact = all(isinstance(name, str) for name in names)
    read_checksums = getattr(store, "label_checksums", None)
    found: dict[str, str] = {} if read_checksums is None else read_checksums(names if exact else None)
    return {"labels": found} if found else {}


def is_known(column: pa.Array) -> NDArray[np.bool_]:
    """Return a mask of the values that are not missing: neither null nor NaN, nor a text without a character.

    >>> is_known(pa.array([1.0, None, float("nan")])).tolist()
    [True, False, False]
    >>> is_known(pa.array(["b", "", " ", None])).tolist()
    [True, False, False, False]
    """
    known = pc.invert(pc.is_null(column, nan_is_null=True))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        known = pc.and_(known, pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False))
    return np.asarray(known)


def value_codes(column: pa.Array) -> NDArray[np.int64]:
    """Return a code for each value, from 0 without gaps; equal values get equal codes.

    >>> value_codes(pa.array(["b", "a", "b"])).tolist()
    [0, 1, 0]
    """
    if pa.types.is_floating(column.type):
        column = pc.add(column.cast(pa.float64()), 0.0)  # -0.0 and 0.0 are one value
    return np.asarray(column.dictionary_encode().indices).astype(np.int64)


def label_codes(column: pa.Array) -> NDArray[np.int64]:
    """Return a code for each value, and −1 for a missing one: null, NaN or an empty text.

    >>> label_codes(pa.array(["b", "", None, "b"])).tolist()
    [0, -1, -1, 0]
    """
    known = is_known(column)
    found = np.full(len(column), -1, np.int64)
    found[known] = value_codes(column.filter(pa.array(known)))
    return found


def choose_task(column: pa.Array, name: str, task: Task | None = None) -> tuple[Task, str]:
    """Return the task of a target's known values, and the reason for it.

    >>> choose_task(pa.array([1.0, 0.0, 1.0]), "label")
    ('classification', 'its values are 0 and 1, as floating-point numbers')

    Raises
    ------
    AnalysisError
        The values are more than two whole numbers as floating-point numbers, which may be classes or a quantity.
    """
    if task is not None:
        return task, AS_REQUESTED
    if not pa.types.is_floating(column.type):
        kind = "text" if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else str(column.type)
        return "classification", f"its values are {kind}"
    values = np.unique(column.to_numpy(zero_copy_only=False))
    if not _all_whole(values):
        return "regression", "its values are numbers with decimals"
    shown = [f"{value:g}" for value in values]
    if len(values) <= 2:
        return "classification", f"its values are {' and '.join(shown)}, as floating-point numbers"
    raise AnalysisError(
        f"target {name!r} may be classes or a quantity",
        expected="text, booleans or integers, which are classes; or numbers with decimals, which are a regression",
        found=f"whole numbers as {column.type}: {', '.join(shown[:6])}{', …' if len(shown) > 6 else ''}"
        " (pandas turns integers into these where values are missing)",
        remedy='give task="classification" or task="regression" (--task on the command line)',
    )


def encode_target(column: pa.Array, name: str, task: Task) -> tuple[NDArray[Any], tuple[Any, ...]]:
    """Return float64 values and no classes, or int64 codes and the sorted classes.

    Classes that are whole numbers are integers, also if the column holds them as floating-point numbers.

    Raises
    ------
    AnalysisError
        There is only one value, or the task cannot use the values.
    """
    values: list[Any] = column.to_pylist()
    classes: tuple[Any, ...] = ()
    if task == "regression":
        if any(isinstance(value, str) for value in values[:1]):
            raise AnalysisError(f"target {name!r} cannot be a regression", expected="numbers", found=str(column.type))
        y = np.asarray(values, float)
        if not np.isfinite(y).all():
            raise AnalysisError(f"target {name!r} has infinite values", expected="finite numbers")
        found = np.unique(y).tolist()
    else:
        if pa.types.is_floating(column.type) and _all_whole(np.asarray(values)):
            values = [int(value) for value in values]
        found = sorted(set(values))
        classes = tuple(found)
        place = {value: code for code, value in enumerate(classes)}
        y = np.asarray([place[value] for value in values], np.int64)
    if len(found) < 2:
        raise AnalysisError(
            f"target {name!r} has one value only",
            expected="at least two classes" if task == "classification" else "values that differ",
            found=f"{found[0]!r} in all {len(values)} documents",
            remedy="choose another target, or capture documents of more than one class",
        )
    return y, classes


def _all_whole(values: NDArray[np.floating]) -> bool:
    return bool((np.isfinite(values) & (values == np.round(values))).all())
