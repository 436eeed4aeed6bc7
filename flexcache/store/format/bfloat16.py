"""Register the Zarr v3 data type ``bfloat16``, which zarr-python lacks (zarr-python issue 2656).

Importing flexcache registers it. The package also names it in the entry point group ``zarr.data_type``, which
zarr-python 3.1 collects but never loads, and xarray, which imports every installed engine, has it in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import Float16, data_type_registry

BFLOAT16: np.dtype = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """bfloat16: the upper half of a float32, two bytes, stored little-endian.

    It is a `zarr.dtype.Float16` in all but the numpy dtype and the name, so scalars, fill values and byte
    order are read and written by zarr's own code.
    """

    dtype_cls: ClassVar[Any] = type(BFLOAT16)
    _zarr_v3_name: ClassVar[Any] = "bfloat16"
    _zarr_v2_names: ClassVar[Any] = ()

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:
        """Return the Zarr data type of a numpy dtype; DataTypeValidationError for any but ``ml_dtypes.bfloat16``."""
        return cls() if dtype == BFLOAT16 else super().from_native_dtype(dtype)

    def to_native_dtype(self) -> Any:
        """Return ``ml_dtypes.bfloat16`` as a numpy dtype; ml_dtypes has no other byte order than the machine's."""
        return BFLOAT16


data_type_registry.register("bfloat16", BFloat16)
