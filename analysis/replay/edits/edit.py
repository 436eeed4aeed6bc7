"""Edits: values that change activations, print their settings, and are written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch

from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.edit_settings import EditSettings, decode_value, encode_value, value_text
from flexcache.errors import AnalysisError, FlexCacheError, nearest

KINDS: dict[str, type[Edit]] = {}
"""Edits by the name of their class, as `from_json` finds them."""


@dataclass(frozen=True, eq=False, repr=False)
class Edit(EditSettings):
    """A change of the activations of chosen tokens. Frozen; ``a >> b`` applies both, ``a | b`` tries each by itself.

    A subclass is a frozen dataclass that defines `change`. The sweep chooses the tokens, not the edit. ::

        @dataclass(frozen=True, eq=False, repr=False)
        class Negate(replay.Edit):
            def change(self, x, context):
                return -x
    """

    strength_field: ClassVar[str] = ""
    """Name of the field that is the strength of the edit, if it has one; a sweep tries each of a list of numbers."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return the new values of *x*, in float32 or wider, shape (tokens, features)."""
        raise NotImplementedError

    def edit_tokens(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], context: EditContext
    ) -> torch.Tensor:
        """Return an activation of shape (lines, longest, features) with the tokens at *index* changed."""
        x = activation[index]
        edited = self.change(x.to(torch.promote_types(x.dtype, torch.float32)), context)
        if not isinstance(edited, torch.Tensor) or edited.shape != x.shape:
            raise AnalysisError(
                "an edit returned another shape",
                where=str(self),
                expected=f"a tensor of shape {tuple(x.shape)}",
                found=f"shape {tuple(edited.shape)}" if isinstance(edited, torch.Tensor) else type(edited).__name__,
            )
        return activation.index_put(index, edited.to(x.dtype))

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edit with random directions of equal length in place of its own; None if it has none."""
        return None

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths that a sweep tries; 1 for an edit without strength."""
        value = getattr(self, self.strength_field) if self.strength_field else 1.0
        return tuple(float(part) for part in value) if isinstance(value, tuple) else (float(value),)

    def at_strength(self, strength: float) -> Edit:
        """Return the edit at one strength."""
        return replace(self, **{self.strength_field: strength}) if self.strength_field else self

    @property
    def name(self) -> str:
        """Name of the edit in results: its class, and the short settings that are not the default."""
        settings = []
        for f in fields(self):
            value = getattr(self, f.name)
            short = isinstance(value, str | int | float) or (
                isinstance(value, tuple) and all(isinstance(part, int | float) for part in value)
            )
            if short and value != f.default and f.name != self.strength_field:
                settings.append(f"{f.name}={value_text(value)}")
        return f"{type(self).__name__}({', '.join(settings)})" if settings else type(self).__name__

    def __or__(self, other: Edit | Alternatives) -> Alternatives:
        return Alternatives((self,)) | other

    def __rshift__(self, other: Edit) -> Chain:
        parts = (*(self.edits if isinstance(self, Chain) else (self,)),)
        return Chain((*parts, *(other.edits if isinstance(other, Chain) else (other,))))

    def __repr__(self) -> str:
        settings = (f"{f.name}={value_text(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(settings)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_json(), sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """Return the edit as plain values: its class and its fields, arrays as base64 of their bytes."""
        return {"kind": type(self).__name__, **{f.name: encode_value(getattr(self, f.name)) for f in fields(self)}}


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Edit):
    """Several edits applied one after the other: ``a >> b``. Its strength is that of the first edit that has one.

    ::

        replay.Scale(2.0) >> replay.Zero([507])
    """

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        self._set("edits", list_edits(self.edits, repeated=True))

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* after all edits."""
        for edit in self.edits:
            x = edit.change(x, context)
        return x

    def edit_tokens(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], context: EditContext
    ) -> torch.Tensor:
        """Return the activation after all edits."""
        for edit in self.edits:
            activation = apply_edit(edit, activation, index, context)
        return activation

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the chain with random directions in the edits that have directions."""
        drawn = [edit.with_random_directions(seed + n, features) for n, edit in enumerate(self.edits)]
        if not any(drawn):
            return None
        return Chain(tuple(new or old for new, old in zip(drawn, self.edits, strict=True)))

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the first edit that has some."""
        return next((edit.strengths for edit in self.edits if edit.strengths != (1.0,)), (1.0,))

    def at_strength(self, strength: float) -> Edit:
        """Return the chain with that edit at one strength."""
        edits = list(self.edits)
        for number, edit in enumerate(edits):
            if edit.strengths != (1.0,):
                edits[number] = edit.at_strength(strength)
                break
        return Chain(tuple(edits))

    @property
    def name(self) -> str:
        """The names of the edits."""
        return " >> ".join(edit.name for edit in self.edits)

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.edits))


@dataclass(frozen=True)
class Alternatives:
    """Edits that a sweep tries one by one: ``a | b``.

    ::

        replay.Zero() | replay.Steer(vector, alpha=[0, 2, 8])
    """

    edits: tuple[Edit, ...]

    def __or__(self, other: Edit | Alternatives) -> Self:
        return type(self)((*self.edits, *(other.edits if isinstance(other, Alternatives) else (check_edit(other),))))

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)


def apply_edit(
    edit: Edit, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], context: EditContext
) -> torch.Tensor:
    """Return what `Edit.edit_tokens` returns.

    Raises
    ------
    AnalysisError
        The edit fails.
    """
    try:
        return edit.edit_tokens(activation, index, context)
    except (FlexCacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a user's own code
        raise AnalysisError(
            f"the edit {edit.name} failed",
            where=f"{str(edit)[:200]} at {context.site}"
            + ("" if context.layer is None else f", layer {context.layer}"),
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="correct the edit; the traceback above shows the line",
        ) from error


def check_edit(value: Any) -> Edit:
    """Return *value* if it is an edit.

    Raises
    ------
    AnalysisError
        It is not an edit, but a class without brackets, for example.
    """
    if isinstance(value, Edit):
        return value
    remedy = None
    if isinstance(value, type) and issubclass(value, Edit):
        remedy = f"write {value.__name__}() with brackets"
    elif callable(value):
        remedy = "write replay.Function(function), for a function of (module, activation, save_ctx, modules)"
    raise AnalysisError(
        "this is not an edit", expected="an edit such as replay.Zero()", found=repr(value)[:80], remedy=remedy
    )


def list_edits(edit: Edit | Alternatives | Iterable[Edit], *, repeated: bool = False) -> tuple[Edit, ...]:
    """Return one or several edits as a tuple. Equal edits are an error unless *repeated* is True.

    Raises
    ------
    AnalysisError
        There is no edit, a value is not an edit, or an edit is given twice.
    """
    given: Any = edit
    if not isinstance(edit, Iterable) or isinstance(edit, str | Mapping):
        given = (edit,)
    edits = tuple(check_edit(part) for part in given)
    if not edits:
        raise AnalysisError("there is no edit", expected="an edit such as replay.Zero()", remedy="give edit=")
    if not repeated and len(set(edits)) < len(edits):
        raise AnalysisError("an edit is given twice", found=str([part.name for part in edits]))
    return edits


def label_edits(edits: Sequence[Edit]) -> list[str]:
    """Return the names of edits in results, with numbers where two edits have the same name."""
    names = [edit.name for edit in edits]
    return [f"{name} {names[:n].count(name) + 1}" if names.count(name) > 1 else name for n, name in enumerate(names)]


def from_json(data: Mapping[str, Any]) -> Edit:
    """Return the edit that `Edit.to_json` described. Only subclasses of `Edit` can be made, nothing else is called.

    Raises
    ------
    AnalysisError
        There is no such edit, or it has other fields.
    """
    content = dict(data)
    kind = KINDS.get(str(content.pop("kind", None)))
    if kind is None:
        raise AnalysisError(f"there is no edit {data.get('kind')!r}", remedy=nearest(str(data.get("kind")), [*KINDS]))
    try:
        return kind(**{name: decode_value(value, from_json) for name, value in content.items()})
    except TypeError as error:
        raise AnalysisError("an edit cannot be made of this", where=kind.__name__, found=str(error)) from error
