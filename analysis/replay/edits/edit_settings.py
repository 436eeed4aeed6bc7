"""Settings of edits: how they are checked, printed, and written as plain JSON values."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from operator import index
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from flexcache.errors import AnalysisError, FlexCacheError
from flexcache.hooks.flexmodel.edit_checks import EditChecks

SHOWN = 4
"""Entries of a long list that are printed."""


class EditSettings(EditChecks):
    """Checks that the fields of an edit hold what they should; each replaces the field by its canonical value."""

    error_type: ClassVar[type[FlexCacheError]] = AnalysisError

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_array(self, name: str, ndims: tuple[int, ...] = (1,)) -> None:
        value = getattr(self, name)
        try:
            value = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except (TypeError, ValueError):  # a ragged list
            raise self.settings_error(f"{name} as an array of numbers", repr(value)[:80]) from None
        if value.ndim not in ndims or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            expected = f"{name} as finite numbers with {' or '.join(map(str, ndims))} dims"
            raise self.settings_error(expected, value_text(value))
        value = np.array(value, np.float64)
        value.setflags(write=False)
        self._set(name, value)

    def _check_numbers(self, name: str) -> None:
        value = getattr(self, name)
        given = value.tolist() if hasattr(value, "tolist") else value
        several = isinstance(given, list | tuple)
        parts = list(given) if several else [given]
        if not parts or not all(_is_finite(part) for part in parts):
            raise self.settings_error(f"{name} as a finite number, or several", repr(value)[:80])
        if several:
            self._set(name, tuple(float(part) for part in parts))
        elif given is not value:
            self._set(name, given)

    def _check_number(self, name: str) -> None:
        self._check_numbers(name)
        if isinstance(getattr(self, name), tuple):
            raise self.settings_error(f"{name} as one number", value_text(getattr(self, name)))

    def _check_indices(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None:
            given = value.tolist() if hasattr(value, "tolist") else value
            parts = list(given) if isinstance(given, Iterable) else []
            if not parts or any(isinstance(part, bool) or not hasattr(part, "__index__") for part in parts):
                raise self.settings_error(f"{name} as a list of whole numbers", repr(value)[:80])
            self._set(name, tuple(index(part) for part in parts))

    def _one_strength(self, value: float | tuple[float, ...] | list[float]) -> float:
        if isinstance(value, tuple | list):
            raise AnalysisError(
                "an edit is made at one strength",
                where=str(self),
                found=str(value),
                remedy="choose one with edit.at_strength(2.0); a sweep tries each of them",
            )
        return float(value)

    def _fit(self, array: NDArray[Any], x: torch.Tensor) -> torch.Tensor:
        return self.fit_vectors(torch.from_numpy(np.array(array)), x, (array.ndim,))


def value_text(value: Any) -> str:
    """Return a setting as it is printed: an array by its shape, a long list by its first entries."""
    if isinstance(value, np.ndarray):
        return f"array{value.shape}"
    if isinstance(value, tuple) and len(value) > SHOWN:
        return f"({', '.join(map(repr, value[:SHOWN]))}, … {len(value)} in all)"
    return repr(value)


def encode_value(value: Any) -> Any:
    """Return a setting as plain values: an edit by its ``to_json``, an array as base64 of its bytes."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "base64": content}
    if isinstance(value, tuple | list):
        return [encode_value(part) for part in value]
    return value


def decode_value(value: Any, decode_edit: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Return the setting that `encode_value` encoded; *decode_edit* makes the edits in it."""
    if isinstance(value, Mapping) and "kind" in value:
        return decode_edit(value)
    if isinstance(value, Mapping) and "base64" in value:
        content = base64.b64decode(value["base64"])
        return np.frombuffer(content, value["dtype"]).reshape(value["shape"])
    return tuple(decode_value(part, decode_edit) for part in value) if isinstance(value, list) else value


def _is_finite(value: Any) -> bool:
    """Return True for a finite number that is not a boolean."""
    return type(value) is not bool and isinstance(value, Real) and bool(np.isfinite(float(value)))
