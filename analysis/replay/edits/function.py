"""Any editing function of FlexModel as an edit of a replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from analysis.replay.edits.edit import Edit
from analysis.replay.edits.edit_context import EditContext
from flexcache.errors import AnalysisError
from flexcache.provenance import callable_fingerprint, import_object


@dataclass(frozen=True, eq=False, repr=False)
class Function(Edit):
    """An editing function of FlexModel's form: ``(module, activation, save_ctx, modules) -> activation``.

    It gets the whole activation, of shape (lines, longest, features); its result is used at the chosen tokens. A
    function given as ``"package.module:attribute"`` can be written as JSON. ::

        replay.Function("my_package.edits:double")
        replay.Function(flexcache.hooks.edits.Scale(0.5))
    """

    function: str | Callable[..., torch.Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function) and not isinstance(self.function, str):
            raise self.settings_error('a function, or "package.module:attribute"', repr(self.function)[:80])

    def to_json(self) -> dict[str, Any]:
        """Return the function's path or, if it is a callable, a description that cannot be read back."""
        value = self.function if isinstance(self.function, str) else callable_fingerprint(self.function)
        return {"kind": "Function", "function": value}

    def edit_tokens(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], context: EditContext
    ) -> torch.Tensor:
        """Return the activation with the chosen tokens from the function."""
        edited = self._load()(context.module, activation.clone(), None, nn.ModuleDict())
        if not isinstance(edited, torch.Tensor) or edited.shape != activation.shape:
            raise AnalysisError(
                "an editing function returned another shape",
                where=str(self),
                expected=str(tuple(activation.shape)),
                found=str(tuple(getattr(edited, "shape", ()))) or type(edited).__name__,
            )
        return activation.index_put(index, edited[index].to(activation.dtype))

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return what the function makes of the tokens, given to it as one line."""
        return self._load()(context.module, x[None].clone(), None, nn.ModuleDict())[0]

    def _load(self) -> Callable[..., torch.Tensor]:
        return import_object(self.function, "an edit") if isinstance(self.function, str) else self.function
