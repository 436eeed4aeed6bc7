"""What an edit is: a value that changes activations, prints what it is, and is written as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from operator import index
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.replay.edits.edit_context import EditContext
from flexcache.errors import AnalysisError, FlexCacheError, nearest

KINDS: dict[str, type[Edit]] = {}
SHOWN = 4
"""Entries of a long list that are printed."""


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """Changes activations of chosen tokens. Frozen; ``a >> b`` does one after the other, ``a | b`` tries either.

    A kind of its own is a frozen dataclass with a `change`; the tokens are chosen by where the edit is placed.
    """

    strength_field: ClassVar[str] = ""
    """Which field is the strength of the edit, where it has one; a list of numbers there is a sweep over them."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return the new values of *x*, in float32 or wider, shape (tokens, features)."""
        raise NotImplementedError

    def whole(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], spot: EditContext
    ) -> torch.Tensor:
        """Return an activation of shape (lines, longest, features) with the tokens at *index* changed."""
        x = activation[index]
        edited = self.change(x.to(torch.promote_types(x.dtype, torch.float32)), spot)
        if not isinstance(edited, torch.Tensor) or edited.shape != x.shape:
            raise AnalysisError(
                "an edit returned another shape",
                where=str(self),
                expected=f"a tensor of shape {tuple(x.shape)}",
                found=f"shape {tuple(edited.shape)}" if isinstance(edited, torch.Tensor) else type(edited).__name__,
            )
        return activation.index_put(index, edited.to(x.dtype))

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the same with random directions of equal length in place of its own; None where it has none."""
        return None

    # Strengths, one after the other

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths that a sweep tries; 1 for an edit that has none."""
        value = getattr(self, self.strength_field) if self.strength_field else 1.0
        return tuple(float(part) for part in value) if isinstance(value, tuple) else (float(value),)

    def at_strength(self, strength: float) -> Edit:
        """Return the edit at one strength."""
        return replace(self, **{self.strength_field: strength}) if self.strength_field else self

    @property
    def name(self) -> str:
        """What the edit is called in results: its kind, and settings of one number or word that are not as usual."""
        said = []
        for f in fields(self):
            value = getattr(self, f.name)
            plain = isinstance(value, str | int | float) or (
                isinstance(value, tuple) and all(isinstance(part, int | float) for part in value)
            )
            if plain and value != f.default and f.name != self.strength_field:
                said.append(f"{f.name}={_shown(value)}")
        return f"{type(self).__name__}({', '.join(said)})" if said else type(self).__name__

    # Values

    def __or__(self, other: Edit | Alternatives) -> Alternatives:
        return Alternatives((self,)) | other

    def __rshift__(self, other: Edit) -> Chain:
        parts = (*(self.edits if isinstance(self, Chain) else (self,)),)
        return Chain((*parts, *(other.edits if isinstance(other, Chain) else (other,))))

    def __repr__(self) -> str:
        said = (f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(said)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_json(), sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """Return the edit as plain values: its kind and its fields, arrays as base64 of their bytes."""
        return {"kind": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    # For kinds

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _array(self, name: str, dims: tuple[int, ...] = (1,)) -> None:
        value = getattr(self, name)
        try:
            value = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except (TypeError, ValueError):  # a ragged list
            raise self._unmeant(f"{name} as an array of numbers", repr(value)[:80]) from None
        if value.ndim not in dims or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise self._unmeant(f"{name} as finite numbers with {' or '.join(map(str, dims))} dims", _shown(value))
        value = np.array(value, np.float64)
        value.setflags(write=False)
        self._set(name, value)

    def _numbers(self, name: str) -> None:
        value = getattr(self, name)
        given = value.tolist() if hasattr(value, "tolist") else value
        several = isinstance(given, list | tuple)
        parts = list(given) if several else [given]
        if not parts or not all(_finite(part) for part in parts):
            raise self._unmeant(f"{name} as a finite number, or several", repr(value)[:80])
        if several:
            self._set(name, tuple(float(part) for part in parts))
        elif given is not value:
            self._set(name, given)

    def _number(self, name: str) -> None:
        self._numbers(name)
        if isinstance(getattr(self, name), tuple):
            raise self._unmeant(f"{name} as one number", _shown(getattr(self, name)))

    def _one(self, value: float | tuple[float, ...] | list[float]) -> float:
        if isinstance(value, tuple | list):
            raise AnalysisError(
                "an edit is made at one strength",
                where=str(self),
                found=str(value),
                remedy="edit.at_strength(2.0) is it at one; a sweep tries each",
            )
        return float(value)

    def _indices(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None:
            given = value.tolist() if hasattr(value, "tolist") else value
            parts = list(given) if isinstance(given, Iterable) else []
            if not parts or any(isinstance(part, bool) or not hasattr(part, "__index__") for part in parts):
                raise self._unmeant(f"{name} as a list of whole numbers", repr(value)[:80])
            self._set(name, tuple(index(part) for part in parts))

    def _unmeant(self, expected: str, found: str) -> AnalysisError:
        return AnalysisError(
            "an edit cannot be made of this", where=type(self).__name__, expected=expected, found=found
        )

    def _fit(self, array: NDArray[Any], x: torch.Tensor) -> torch.Tensor:
        if array.shape[-1] != x.shape[-1]:
            raise AnalysisError(
                "an edit does not fit the activation",
                where=str(self),
                expected=f"{x.shape[-1]} features",
                found=str(array.shape),
                remedy="take vectors from the site that is edited",
            )
        return torch.from_numpy(np.array(array)).to(x)

    def _dims(self, dims: tuple[int, ...], x: torch.Tensor) -> list[int]:
        if any(not -x.shape[-1] <= dim < x.shape[-1] for dim in dims):
            raise AnalysisError(
                "an edit does not fit the activation",
                where=str(self),
                expected=f"features from 0 to {x.shape[-1] - 1}",
                found=str(list(dims)),
            )
        return list(dims)


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Edit):
    """Several edits, one after the other, as ``a >> b`` makes it. The strength is that of the first that has one."""

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        self._set("edits", alternatives(self.edits, repeated=True))

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x* after all edits."""
        for edit in self.edits:
            x = edit.change(x, spot)
        return x

    def whole(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], spot: EditContext
    ) -> torch.Tensor:
        """Return the activation after all edits."""
        for edit in self.edits:
            activation = apply(edit, activation, index, spot)
        return activation

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the chain with random directions where its parts have directions."""
        drawn = [edit.with_random_directions(seed + n, features) for n, edit in enumerate(self.edits)]
        if not any(drawn):
            return None
        return Chain(tuple(new or old for new, old in zip(drawn, self.edits, strict=True)))

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the first part that has some."""
        return next((edit.strengths for edit in self.edits if edit.strengths != (1.0,)), (1.0,))

    def at_strength(self, strength: float) -> Edit:
        """Return the chain with that part at one strength."""
        edits = list(self.edits)
        for place, edit in enumerate(edits):
            if edit.strengths != (1.0,):
                edits[place] = edit.at_strength(strength)
                break
        return Chain(tuple(edits))

    @property
    def name(self) -> str:
        """The names of the parts."""
        return " >> ".join(edit.name for edit in self.edits)

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.edits))


@dataclass(frozen=True)
class Alternatives:
    """Edits to try one by one, as ``a | b`` makes it."""

    edits: tuple[Edit, ...]

    def __or__(self, other: Edit | Alternatives) -> Self:
        return type(self)((*self.edits, *(other.edits if isinstance(other, Alternatives) else (checked_edit(other),))))

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)


def apply(
    edit: Edit, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], spot: EditContext
) -> torch.Tensor:
    """Return what `Edit.whole` returns.

    Raises
    ------
    AnalysisError
        The edit fails.
    """
    try:
        return edit.whole(activation, index, spot)
    except (FlexCacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a user's own code
        raise AnalysisError(
            f"the edit {edit.name} failed",
            where=f"{str(edit)[:200]} at {spot.site}" + ("" if spot.layer is None else f", layer {spot.layer}"),
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="correct the edit; the traceback above shows the line",
        ) from error


def checked_edit(value: Any) -> Edit:
    """Return *value* if it is an edit.

    Raises
    ------
    AnalysisError
        It is something else, such as a class without brackets.
    """
    if isinstance(value, Edit):
        return value
    remedy = None
    if isinstance(value, type) and issubclass(value, Edit):
        remedy = f"write {value.__name__}() with brackets"
    elif callable(value):
        remedy = "write replay.Function(function), for a function of (module, activation, save_ctx, modules)"
    raise AnalysisError(
        "that is no edit", expected="an edit such as replay.Zero()", found=repr(value)[:80], remedy=remedy
    )


def alternatives(edit: Edit | Alternatives | Iterable[Edit], *, repeated: bool = False) -> tuple[Edit, ...]:
    """Return edits as a tuple, however they were given; only with *repeated* may one be given twice.

    Raises
    ------
    AnalysisError
        There is none, or something is no edit, or one is given twice.
    """
    given: Any = edit
    if not isinstance(edit, Iterable) or isinstance(edit, str | Mapping):
        given = (edit,)
    edits = tuple(checked_edit(part) for part in given)
    if not edits:
        raise AnalysisError("there is no edit", expected="an edit such as replay.Zero()", remedy="give edit=")
    if not repeated and len(set(edits)) < len(edits):
        raise AnalysisError("an edit is given twice", found=str([part.name for part in edits]))
    return edits


def labels(edits: Sequence[Edit]) -> list[str]:
    """Return what edits are called in results, numbered where two would be called alike."""
    names = [edit.name for edit in edits]
    return [f"{name} {names[:n].count(name) + 1}" if names.count(name) > 1 else name for n, name in enumerate(names)]


def from_json(data: Mapping[str, Any]) -> Edit:
    """Return the edit that `Edit.to_json` described; nothing but the kinds of this package is made.

    Raises
    ------
    AnalysisError
        There is no such kind, or its fields are others.
    """
    content = dict(data)
    kind = KINDS.get(str(content.pop("kind", None)))
    if kind is None:
        raise AnalysisError(f"there is no edit {data.get('kind')!r}", remedy=nearest(str(data.get("kind")), [*KINDS]))
    try:
        return kind(**{name: _value(value) for name, value in content.items()})
    except TypeError as error:
        raise AnalysisError("an edit cannot be made of this", where=kind.__name__, found=str(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Edit):
        return value.to_json()
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "base64": content}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value


def _value(value: Any) -> Any:
    if isinstance(value, Mapping) and "kind" in value:
        return from_json(value)
    if isinstance(value, Mapping) and "base64" in value:
        content = base64.b64decode(value["base64"])
        return np.frombuffer(content, value["dtype"]).reshape(value["shape"])
    return tuple(_value(part) for part in value) if isinstance(value, list) else value


def _finite(value: Any) -> bool:
    """Return True for a finite number that is no boolean."""
    return type(value) is not bool and isinstance(value, Real) and bool(np.isfinite(float(value)))


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array{value.shape}"
    if isinstance(value, tuple) and len(value) > SHOWN:
        return f"({', '.join(map(repr, value[:SHOWN]))}, … {len(value)} in all)"
    return repr(value)
