"""Rows as int8 with one scale a row: half the bytes of bfloat16, and the scales as an array of their own.

A row *x* is stored as ``round(x / s)`` with ``s = max |x| / 127`` in float32, and read back as ``s`` times that: absmax
quantization (Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, there for matrix products). An error is at most half
of ``s``, so a row with one massive activation loses what is small beside it. `flexcache bench-codec` tells how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from flexcache.spec import ArraySpec

SCALE = ".scale"
LEVELS = 127
LARGEST = np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0))
"""A scale of which 127 are finite, whatever the rounding."""


def scale_name(name: str) -> str:
    """Return the name of the array that holds the scales of an int8 array."""
    return name + SCALE


def scales_of(array: ArraySpec) -> ArraySpec:
    """Return the array of the scales of an int8 array: float32, one value a row."""
    return replace(
        array,
        name=scale_name(array.name),
        site=scale_name(array.site),
        features=1,
        feature_dim=f"feature_{scale_name(array.name)}",
        dtype="float32",
    )


def with_scales(arrays: Iterable[ArraySpec]) -> list[ArraySpec]:
    """Return arrays with the scales behind each that is int8; *arrays* may have some of them already."""
    given = {array.name: array for array in arrays}
    plain = [array for array in given.values() if not is_scale(array.name, given)]
    return [one for array in plain for one in ((array, scales_of(array)) if array.dtype == "int8" else (array,))]


def is_scale(name: str, arrays: Mapping[str, ArraySpec]) -> bool:
    """Whether an array holds the scales of another."""
    owner = arrays.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return owner is not None and owner.dtype == "int8"


def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as int8, and their scales.

    Parameters
    ----------
    rows
        float32, shape (rows, features), finite.

    Returns
    -------
    values : ndarray of int8, shape (rows, features)
    scales : ndarray of float32, shape (rows, 1)
    """
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(LEVELS)
    scales = np.minimum(scales, LARGEST)
    scaled = np.divide(rows, scales, out=np.zeros_like(rows), where=scales > 0)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -LEVELS, LEVELS, out=scaled)  # a scale among the smallest floats is itself rounded
    return scaled.astype(np.int8), scales
