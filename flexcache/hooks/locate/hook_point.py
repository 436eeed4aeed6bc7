"""A hook point: the input or output of one module, and the store's array that it fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.experts import read_experts
from flexcache.hooks.locate.fused_projection import FusedProjectionSlice
from flexcache.site import ExpertSide, Side


@dataclass(frozen=True)
class HookPoint:
    """A site found in a model: the place where one layer of an array is read.

    It is a plain value without a module, so that it can be used for a copy of the model on another device.

    >>> point = HookPoint("mlp_out", 3, "model.layers.3.mlp")
    >>> str(point)
    'mlp_out[3] (model.layers.3.mlp:output)'
    >>> point.read_output((torch.ones(2, 5, 8), None)).shape
    torch.Size([2, 5, 8])

    Attributes
    ----------
    array : str
        Name of the store's array.
    layer : int or None
        Number of the block; None for a module path.
    module : str
        Dotted path, without prefixes of wrappers.
    side : {"input", "output", "pattern", "summands", "choice", "weights", "neurons", "projections"}
        A pattern is the second output of an attention module: its probabilities. The last five are read at the experts
        of a mixture, see `read_experts`.
    gradient : bool
        If True, the gradient of an objective with respect to the activation is read.
    fused_slice : FusedProjectionSlice or None
        The slice of the module's features to read; None for all.
    """

    array: str
    layer: int | None
    module: str
    side: Side = "output"
    gradient: bool = False
    fused_slice: FusedProjectionSlice | None = None

    def __str__(self) -> str:
        place = f"{self.module}:{self.side}" + (".grad" if self.gradient else "")
        return place if self.layer is None else f"{self.array}[{self.layer}] ({place})"

    @property
    def all_features(self) -> HookPoint:
        """The same hook point without its slice."""
        return replace(self, fused_slice=None)

    def select_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features of this point: all of *features*, or a view of its slice.

        Raises
        ------
        SiteError
            The features are not those of the whole projection.
        """
        return features if self.fused_slice is None else self.fused_slice.read_slice(features, str(self))

    @property
    def of_experts(self) -> bool:
        """True if the activation is computed in addition to the forward, from the inputs of a mixture's experts."""
        return self.side not in ("input", "output", "pattern")

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> torch.Tensor:
        """Return the activation of one run of *module*, from its arguments or its output.

        Raises
        ------
        SiteError
            It is not a tensor of floating-point numbers, or see `read_experts`.
        """
        if self.of_experts:
            return read_experts(module, cast("ExpertSide", self.side), args, kwargs, str(self))
        return self.read_input(args, kwargs) if self.side == "input" else self.read_output(output)

    def read_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the activation in a module's arguments: the first positional one, or ``hidden_states``.

        Raises
        ------
        SiteError
            It is not a tensor of floating-point numbers.
        """
        given = args[0] if args else kwargs.get("hidden_states")
        if given is None:
            raise self._no_tensor(f"keywords {', '.join(kwargs) or 'none'}", "a tensor as first argument")
        return self._activation(given)

    def read_output(self, output: Any) -> torch.Tensor:
        """Return the activation in a module's output: the tensor, or the first element of a container.

        Raises
        ------
        SiteError
            It is not a tensor of floating-point numbers.
        """
        if self.side == "pattern":
            return self._pattern(output)
        return self.select_features(self._first(output))

    def replace_output(self, output: Any, value: torch.Tensor) -> Any:
        """Return a module's output with *value* in the place that `read_output` reads.

        Raises
        ------
        SiteError
            The output has no activation, or not the whole projection.
        """
        if self.fused_slice is not None:
            value = self.fused_slice.write_slice(self._first(output), value, str(self))
        return value if isinstance(output, torch.Tensor) else (value, *output[1:])

    def _first(self, output: Any) -> torch.Tensor:
        if isinstance(output, Mapping):
            output = next(iter(output.values()), None)
        elif isinstance(output, tuple | list):
            output = output[0] if output else None
        return self._activation(output)

    def reshape_to_tokens(self, tensor: torch.Tensor, batch: tuple[int, int]) -> torch.Tensor:
        """Return a view of shape (batch, sequence, feature…); *tensor* may have the first two dims as one.

        Raises
        ------
        SiteError
            The tensor does not have one activation for each token.
        """
        rows, length = batch
        if self.side == "pattern" and tensor.ndim == 4 and (tensor.shape[0], *tensor.shape[2:]) == (*batch, length):
            return tensor
        if self.side != "pattern" and tensor.ndim >= 3 and tuple(tensor.shape[:2]) == batch:
            return tensor
        if self.side != "pattern" and tensor.ndim >= 2 and tensor.shape[0] == rows * length:
            return tensor.unflatten(0, batch)
        raise SiteError(
            f"activations of {self} are not one for each token",
            expected=f"shape ({rows}, {length}, features) or ({rows * length}, features)",
            found=str(tuple(tensor.shape)),
            remedy="choose a module that keeps the batch and the sequence as the first dims",
        )

    def _pattern(self, output: Any) -> torch.Tensor:
        pattern = output[1] if isinstance(output, tuple | list) and len(output) > 1 else None
        if not isinstance(pattern, torch.Tensor):
            raise SiteError(
                "the attention module returns no probabilities",
                where=str(self),
                expected="a tuple of its output and of probabilities (sequences, heads, queries, keys)",
                found="None in their place" if pattern is None else type(pattern).__name__,
                remedy='load the model with attn_implementation="eager" (model.attention: eager): fused kernels do not'
                " compute the probabilities",
            )
        return pattern

    def _activation(self, value: Any) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise self._no_tensor(type(value).__name__, "a tensor, or a tuple that begins with one")
        if not value.is_floating_point():
            raise self._no_tensor(f"a tensor of {value.dtype}", "a tensor of floating-point numbers")
        return value

    def _no_tensor(self, found: str, expected: str) -> SiteError:
        return SiteError(
            f"the {self.side} of {self.module} has no activation to read",
            where=str(self),
            expected=expected,
            found=found,
            remedy=f"read the module's {'output' if self.side == 'input' else 'input'}, or a module within it",
        )
