"""Quantize rows to int8 with one scale per row: half the bytes of bfloat16; the scales are a separate array.

A row *x* is stored as ``round(x / s)`` with ``s = max |x| / 127`` in float32, and read back as ``s`` times that: absmax
quantization (Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, there for matrix products). The error of a value is at
most half of ``s``, so a row with one massive activation loses its small values. `flexcache bench-codec` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from flexcache.spec import ArraySpec

SCALE = ".scale"
LEVELS = 127
LARGEST = np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0))
"""Largest scale whose product with 127 is finite in float32."""


def scale_name(name: str) -> str:
    """Return the name of the array that holds the scales of an int8 array."""
    return name + SCALE


def scales_of(array: ArraySpec) -> ArraySpec:
    """Return the scale array of an int8 array: float32, one value per row."""
    return replace(
        array,
        name=scale_name(array.name),
        site=scale_name(array.site),
        features=1,
        feature_dim=f"feature_{scale_name(array.name)}",
        dtype="float32",
    )


def with_scales(arrays: Iterable[ArraySpec]) -> list[ArraySpec]:
    """Return arrays, each int8 array followed by its scales; *arrays* may already contain some scales."""
    given = {array.name: array for array in arrays}
    plain = [array for array in given.values() if not is_scale(array.name, given)]
    return [one for array in plain for one in ((array, scales_of(array)) if array.dtype == "int8" else (array,))]


def is_scale(name: str, arrays: Mapping[str, ArraySpec]) -> bool:
    """Return True if an array holds the scales of another one."""
    owner = arrays.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return owner is not None and owner.dtype == "int8"


def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows to int8.

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
