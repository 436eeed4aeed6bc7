"""Find values that are not finite by their bit patterns: two passes of integer maxima, no copy."""

from __future__ import annotations

import numpy as np

# All exponent bits set, no fraction: the first pattern that is not finite.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def first_nonfinite(content: np.ndarray, dtype: np.dtype) -> int | None:
    """Return the index of the first NaN or infinity in *content*, uint8 of shape (bytes,), or None.

    Read as an integer, a float whose exponent bits are all set is larger than every finite one of its sign, so
    the maxima of the bytes as signed and as unsigned integers show if there is one.
    """
    if not len(content) or dtype.kind == "i":
        return None
    width = dtype.itemsize
    infinity, sign = _INFINITY[dtype.name], 1 << (8 * width - 1)
    signed, unsigned = content.view(f"<i{width}"), content.view(f"<u{width}")
    if int(signed.max()) < infinity and int(unsigned.max()) < infinity + sign:
        return None
    return int(np.flatnonzero((unsigned & np.array(sign - 1, unsigned.dtype)) >= infinity)[0])
