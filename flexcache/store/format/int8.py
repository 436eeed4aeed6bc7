"""Quantize rows to int8 with one scale per row, and keep the largest values of each row exactly.

A value *x* is stored as ``round(x / s)``, and read back as ``s`` times that. ``s`` is the largest magnitude of the row
÷ 127 in float32, without the largest values of the row, about one in 128: these are float32, and marked by -128. They
are kept apart because a few dims have values that are hundreds of times larger than the others, at every position or at
the first one, and one scale over all of them would round the others to few levels (Dettmers et al. 2022, LLM.int8(),
arXiv:2208.07339, there for dims of matrix products). The array of scales has the scale of a row, then its outliers in
the order of their dims. Arrays of schema 1 have no outliers. `flexcache bench-codec` measures the error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from flexcache.array_spec import ArraySpec
from flexcache.errors import DamagedError

SCALE = ".scale"
LEVELS = 127
OUTLIER = -128
"""Value that stands for an outlier."""
FEATURES_PER_OUTLIER = 128
LARGEST = np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0))
"""Largest scale whose product with 127 is finite in float32."""


def scale_name(name: str) -> str:
    """Return the name of the array that holds the scales of an int8 array."""
    return name + SCALE


def default_outliers(features: int) -> int:
    """Return the number of outliers of a row.

    >>> default_outliers(64), default_outliers(640)
    (1, 5)
    """
    return -(-features // FEATURES_PER_OUTLIER)


def outlier_count(name: str, arrays: Mapping[str, ArraySpec]) -> int:
    """Return the number of outliers of a row of an array; 0 if it is not int8, or has schema 1."""
    return arrays[scale_name(name)].features - 1 if arrays[name].dtype == "int8" else 0


def scales_of(array: ArraySpec, outliers: int) -> ArraySpec:
    """Return the scale array of an int8 array: float32, the scale and the outliers of each row."""
    return replace(
        array,
        name=scale_name(array.name),
        site=scale_name(array.site),
        features=1 + outliers,
        feature_dim=f"feature_{scale_name(array.name)}",
        dtype="float32",
    )


def with_scales(arrays: Iterable[ArraySpec], existing: Mapping[str, ArraySpec] | None = None) -> list[ArraySpec]:
    """Return arrays, each int8 array followed by its scales; *arrays* may already contain some scales.

    Parameters
    ----------
    existing
        Arrays of the store that they belong to: if its int8 arrays have no outliers, neither have these.
    """
    given, stored = {array.name: array for array in arrays}, existing or {}
    plain = any(is_scale(name, stored) and array.features == 1 for name, array in stored.items())
    found = []
    for array in given.values():
        if not is_scale(array.name, given):
            scaled = array.dtype == "int8"
            found += [array, scales_of(array, 0 if plain else default_outliers(array.features))] if scaled else [array]
    return found


def is_scale(name: str, arrays: Mapping[str, ArraySpec]) -> bool:
    """Return True if an array holds the scales of another one."""
    owner = arrays.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return owner is not None and owner.dtype == "int8"


def quantize(rows: np.ndarray, outliers: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows to int8.

    >>> values, scales = quantize(np.float32([[1, -2, 900, 4]]), outliers=1)
    >>> values.tolist(), scales[0, 1:].tolist()
    ([[32, -64, -128, 127]], [900.0])

    Parameters
    ----------
    rows
        float32, shape (rows, features), finite.
    outliers
        Number of values of each row that are kept exactly: the largest magnitudes, of equal ones the first dims.

    Returns
    -------
    values : ndarray of int8, shape (rows, features)
    scales : ndarray of float32, shape (rows, 1 + outliers)
    """
    magnitude = np.abs(rows)
    scales = np.empty((len(rows), 1 + outliers), np.float32)
    if outliers:
        marked = _largest(magnitude, outliers)
        scales[:, 1:] = rows[marked].reshape(-1, outliers)
        magnitude[marked] = 0
    scale = np.minimum(magnitude.max(axis=1, keepdims=True) / np.float32(LEVELS), LARGEST)
    with np.errstate(over="ignore"):  # of outliers, which are not scaled
        scaled = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -LEVELS, LEVELS, out=scaled)  # a scale among the smallest floats is itself rounded
    scales[:, :1] = scale
    values = scaled.astype(np.int8)
    if outliers:
        values[marked] = OUTLIER
    return values, scales


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Multiply int8 values, given as float32, by their scales in place, insert the outliers, and return them.

    Raises
    ------
    DamagedError
        A row has another number of outliers than its scales.
    """
    outliers = scales.shape[1] - 1
    marked = values == OUTLIER if outliers else None
    with np.errstate(over="ignore"):  # -128, which an outlier takes the place of, may exceed float32
        values *= scales[:, :1]
    if marked is not None:
        if (marked.sum(axis=1, dtype=np.int32) != outliers).any():
            raise DamagedError(
                "an int8 row does not have the outliers of its scales",
                expected=f"{outliers} values of {OUTLIER} in each row",
                remedy="run flexcache verify to see what is damaged",
            )
        values[marked] = scales[:, 1:].reshape(-1)
    return values


def _largest(magnitude: np.ndarray, count: int) -> np.ndarray:
    """Return a mask of the *count* largest values of each row; of equal ones, the first."""
    least = -np.partition(-magnitude, count - 1, axis=1)[:, count - 1 : count]
    marked = magnitude >= least
    tied = np.flatnonzero(marked.sum(axis=1, dtype=np.int32) != count)
    first = np.argsort(-magnitude[tied], axis=1, kind="stable")[:, :count]
    marked[tied] = False
    marked[tied[:, None], first] = True
    return marked
