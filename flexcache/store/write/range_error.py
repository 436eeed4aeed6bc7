"""Describe a value that cannot be stored: its site, layer, document and token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from flexcache.array_spec import DTYPES
from flexcache.errors import RangeError
from flexcache.store.read.store import Store
from flexcache.store.write.row_encoding import Unstorable
from flexcache.store.write.shard_file import NonFinite


def place(site: str, layer: int | None) -> str:
    """Return a site and layer as text."""
    return site if layer is None else f"{site} of layer {layer}"


@contextmanager
def locating_values(store: Store, array: str = "", layer: int | None = None, row: int = 0) -> Iterator[None]:
    """Raise RangeError, with document and token, for a value that overflows its dtype or is not finite.

    Parameters
    ----------
    array, layer, row
        What is encoded: an array, a layer, and the number of the first row.
    """
    try:
        yield
    except NonFinite as error:
        raise _range_error(store, error.array, error.layer, error.row, error.feature, error.value) from None
    except Unstorable as error:
        raise _range_error(store, array, layer, row + error.row, error.feature, error.value) from None


def _range_error(store: Store, array: str, layer: int | None, row: int, feature: int, value: float) -> RangeError:
    documents = store.documents
    line = int(np.searchsorted(documents.column("row_start").to_numpy(), row, side="right")) - 1
    dtype = store.arrays[array].dtype
    finite = math.isfinite(value)
    at = int(store.coordinates["position"][row].values)
    return RangeError(
        f"{place(array, layer)} has a value that {'overflows ' + dtype if finite else 'is not finite'}",
        where=f"document {documents.column('id')[line].as_py()!r}, "
        + (f"token {at}, " if at >= 0 else "")
        + f"row {row}, feature {feature}",
        expected="a finite value"
        if dtype == "int8"
        else f"a finite value of magnitude at most {float(ml_dtypes.finfo(DTYPES[dtype]).max):.6g}",
        found=f"{value:.6g}",
        remedy="store this site as bfloat16 or float32"
        if finite
        else "look at the document and the model: this value is wrong in the forward itself, or a wider"
        " compute dtype is needed",
    )
