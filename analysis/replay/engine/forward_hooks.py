"""Hooks of one forward: apply edits, capture activations, and compute logits at chosen positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.replay.edits.edit import Edit, apply_edit
from analysis.replay.edits.edit_context import EditContext
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.hook_scope import hook_scope


@dataclass(frozen=True)
class PlacedEdit:
    """An edit, and where in a forward it is made.

    ::

        first_tokens = (np.arange(batch.shape[0]), np.zeros(batch.shape[0], int))
        replay.PlacedEdit(engine.point("resid_post", 12), replay.Zero(), first_tokens)

    Attributes
    ----------
    point : HookPoint
    edit : Edit
    tokens : tuple of ndarray of int64, shapes (n,) and (n,)
        Lines of the forward, and positions.
    """

    point: HookPoint
    edit: Edit
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]]
    seed: int = 0


@dataclass
class ForwardResult:
    """The logits and captured activations of a forward.

    Attributes
    ----------
    logits : Tensor, shape (lines, read, vocabulary)
        At the positions that were asked for. For a model without logits, its first output: (lines, longest, features).
        For a model that classifies whole sequences or images: (lines, classes).
    residuals : mapping from (site, layer) to Tensor of shape (lines, longest, features)
    left_out : set of int
        Lines in which an edit could not be made.
    """

    logits: torch.Tensor
    residuals: dict[tuple[str, int | None], torch.Tensor]
    left_out: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False, repr=False)
class GivenValues(Edit):
    """Replace the chosen tokens by the values that were computed for them; for a single forward.

    ::

        engine.run(batch, start, [PlacedEdit(point, GivenValues(values), tokens)])

    Attributes
    ----------
    values : Tensor, shape (tokens, features)
        In the order of the tokens.
    """

    values: Any

    def edit_tokens(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], context: EditContext
    ) -> torch.Tensor:
        """Return the activation with the values at *index*."""
        return activation.index_put(index, self.values.to(activation.device, activation.dtype))


@contextmanager
def edit_activation(
    module: nn.Module,
    point: HookPoint,
    edits: Sequence[tuple[PlacedEdit, EditContext]],
    shape: tuple[int, int],
    each: int,
) -> Iterator[None]:
    """Apply *edits* to a module's value at a hook point, of *shape* (lines, longest, …), at their tokens.

    An edit gets the copies of the batch, of *each* lines, that contain its tokens.
    """
    made = [one for one in edits if len(one[0].tokens[0])]

    def edited(values: torch.Tensor) -> torch.Tensor:
        if not made:
            return values
        whole = point.reshape_to_tokens(values, shape).clone()
        for placed, context in made:
            lines, positions = placed.tokens
            first, last = int(lines.min()) // each * each, int(lines.max()) // each * each + each
            index = (torch.from_numpy(lines - first).to(values.device), torch.from_numpy(positions).to(values.device))
            part = whole[first:last]
            part.copy_(apply_edit(placed.edit, part, index, context))
        return whole.reshape(values.shape)

    def on_output(_: nn.Module, args: Any, output: Any) -> Any:
        return point.replace_output(output, edited(point.read_output(output)))

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = edited(point.read_input(args, kwargs))
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    if point.side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    with hook_scope([handle]):
        yield


@contextmanager
def capture_activation(
    module: nn.Module, point: HookPoint, key: tuple[str, int | None], shape: tuple[int, int], result: ForwardResult
) -> Iterator[None]:
    """Put the value at a hook point, after edits, into ``result.residuals[key]``."""

    def keep(values: torch.Tensor) -> None:
        result.residuals[key] = point.reshape_to_tokens(values, shape).clone()

    if point.side == "input":
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(point.read_input(args, kwargs)), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda _, args, kwargs, output: keep(point.read(module, args, kwargs, output)), with_kwargs=True
        )
    with hook_scope([handle]):
        yield


@contextmanager
def limit_head(head: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Compute a model's logits only at *positions*, shape (lines, read)."""

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = positions[..., None].expand(*positions.shape, args[0].shape[-1])
        return (args[0].gather(1, index.to(args[0].device)), *args[1:])

    with hook_scope([head.register_forward_pre_hook(choose)]):
        yield
