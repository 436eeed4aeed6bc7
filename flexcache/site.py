"""Sites: places in a model that produce activations, by the field's short names or by module path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

from flexcache.errors import ConfigError, SiteError, nearest

ExpertSide = Literal["summands", "choice", "weights", "neurons", "projections"]
Side = Literal["input", "output", "pattern"] | ExpertSide
Layers = Literal["all"] | int | str | Sequence[int]

STANDARD: dict[str, str] = {
    "resid_pre": "the residual stream that enters a block",
    "resid_mid": "the residual stream after a block's attention, before its MLP, or its cross-attention where there is"
    " one; parallel blocks have none",
    "resid_post": "the residual stream that leaves a block",
    "attn_out": "the output of attention, as added to the residual stream (after a post-norm, if there is one)",
    "cross_attn_out": "the output of attention to an encoder's states, as added to a decoder's residual stream",
    "mlp_out": "the output of the MLP, as added to the residual stream (after a post-norm, if there is one)",
    "mlp_pre": "the input of the MLP's non-linearity: its hidden neurons (in a gated MLP, those of the gate)",
    "mlp_post": "the input of the MLP's down-projection: its hidden neurons after the non-linearity (in a mixture of"
    " experts, those of the chosen experts, in the order of expert_index)",
    "q": "queries, as projected: before norm and rotary positions, head by head",
    "k": "keys, as projected: before norm and rotary positions, head by head",
    "v": "values, as projected, head by head",
    "z": "the input of attention's output projection: the results of the heads, head by head",
    "router_logits": "the scores of the experts in a mixture of experts, before the softmax",
    "expert_out": "the outputs of the chosen experts times their weights, expert after expert by number; their sum is"
    " what the experts add to the MLP's output",
    "expert_index": "the numbers of the chosen experts, ascending, in float32",
    "expert_weight": "the weights of the chosen experts, in the order of expert_index",
}
ONCE: dict[str, str] = {
    "embed": "the output of the token embedding",
    "final_norm": "the residual stream after the last norm, which the head reads",
}
"""Sites that a model has once, not in every block."""

EXPERT_SIDES: dict[str, ExpertSide] = {
    "expert_out": "summands",
    "expert_index": "choice",
    "expert_weight": "weights",
    "mlp_post": "neurons",
}
"""Value at the experts of a mixture that each site reads; ``mlp_post`` only if the MLP is a mixture."""

READ_ONLY = ("resid_mid", "router_logits", "expert_out", "expert_index", "expert_weight")
"""Read-only sites: a parallel path bypasses them, or they are computed beside the forward."""

FEATURE_DIM = {
    "mlp_pre": "neuron",
    "mlp_post": "neuron",
    "q": "query",
    "k": "key",
    "v": "value",
    "z": "head",
    "router_logits": "expert",
    "expert_out": "expert_hidden",
    "expert_index": "slot",
    "expert_weight": "slot",
}
EXPERT_NEURONS = "expert_neuron"
"""The last dim of ``mlp_post`` in a mixture of experts."""
PATTERN = "pattern"
"""Attention probabilities, (sequences, heads, queries, keys): not one row for each token, so only for transforms."""
GRADIENT = ".grad"


@dataclass(frozen=True)
class Site:
    """A place in a model: one of `STANDARD`, present in every block, or a module path or glob with a side.

    >>> Site.parse("resid_post").standard
    True
    >>> Site.parse("model.layers.*.mlp.up_proj:input").side
    'input'
    >>> Site.parse("mlp_out.grad").array
    'mlp_out.grad'

    `Site.parse("embed")` is one of `ONCE`. A path without a side means the module's output. With ``.grad`` at the end,
    the site is the gradient of the capture's objective with respect to the activation.
    """

    name: str
    side: Side = "output"
    gradient: bool = False

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site as users write it.

        Raises
        ------
        SiteError
            The text is empty, names a side other than ``input`` and ``output``, or looks like a misspelt standard name.
        """
        text = text.strip()
        gradient = text.endswith(GRADIENT)
        name, colon, side = text.removesuffix(GRADIENT).partition(":")
        if not name or (colon and side not in ("input", "output")):
            raise SiteError(
                f"site {text!r} cannot be read",
                expected=f"one of {', '.join((*STANDARD, *ONCE))}, or a module path such as model.layers.3.mlp:input",
                found=repr(text),
                remedy="after the colon write input or output, or leave the colon out for the output",
            )
        if name == PATTERN:
            raise SiteError(
                "the attention pattern has no row for each token, so it cannot be stored as it is",
                expected=f"one of {', '.join(STANDARD)}, or a module path",
                remedy='store a function of it: flexcache.Transform("my_name", "pattern", function=…)',
            )
        if (name in STANDARD or name in ONCE) and colon:
            raise SiteError(
                f"site {name} has no side",
                found=repr(text),
                remedy=f"write {name}; a side belongs to a module path",
            )
        if name not in STANDARD and name not in ONCE and re.fullmatch(r"[a-z]+_[a-z]+", name):
            close = nearest(name, (*STANDARD, *ONCE))
            if close.startswith("did you mean"):
                raise SiteError(f"there is no site {name!r}", remedy=close)
        return cls(name, "input" if side == "input" else "output", gradient)

    @property
    def standard(self) -> bool:
        """True if the site exists once in each block, and is stored as one (layer, token, …) array."""
        return self.name in STANDARD

    @property
    def array(self) -> str:
        """The name of the site's array in a store; for a glob, of each match, see `array_name`."""
        return self.activation_array + (GRADIENT if self.gradient else "")

    @property
    def activation_array(self) -> str:
        """The name of the array of the activation itself, if the site is its gradient."""
        return self.name if self.standard else array_name(self.name, self.side)

    @property
    def feature_dim(self) -> str:
        """The name of the array's last dim: ``hidden``, ``neuron``, or ``feature_<array>``."""
        named = self.standard or self.name in ONCE
        return FEATURE_DIM.get(self.name, "hidden") if named else f"feature_{self.activation_array}"

    def __str__(self) -> str:
        plain = self.name if self.standard or self.side == "output" else f"{self.name}:{self.side}"
        return plain + (GRADIENT if self.gradient else "")


def array_name(module: str, side: Side) -> str:
    """Return the store's array name for a module path: the path itself, with ``.input`` for its input."""
    return module if side == "output" else f"{module}.input"


def plain_layers(layers: Any) -> int | str | list[int]:
    """Return layers as a store keeps them: ``"all"``, a slice as text, a number, or a list of numbers.

    >>> plain_layers("0,8"), plain_layers("3"), plain_layers(range(2)), plain_layers("8:24"), plain_layers("every:6")
    ([0, 8], 3, [0, 1], '8:24', 'every 6')

    Raises
    ------
    ConfigError
        *layers* is something else, such as None or text that is not a slice.
    """
    if isinstance(layers, str):
        text = "".join(layers.split())
        if found := re.fullmatch(r"every:?([1-9]\d*)", text):
            return f"every {found[1]}"
        if text == "all" or re.fullmatch(r"(-?\d+)?:(-?\d+)?(:-?\d+)?", text):
            return text
        if re.fullmatch(r"-?\d+(,-?\d+)*,?", text):
            numbers = [int(part) for part in text.split(",") if part]
            return numbers if "," in text else numbers[0]
    else:
        try:
            one = hasattr(layers, "__index__") and getattr(layers, "ndim", 0) == 0  # arrays have __index__ too
            asked = [layers] if one else list(layers)
            if not any(isinstance(layer, bool) for layer in asked):
                return index(layers) if one else [index(layer) for layer in asked]
        except TypeError:
            pass
    raise ConfigError(
        f"layers {layers!r} cannot be read",
        expected="all, a number, a list of numbers, or text such as 0,8 or 8:24 or every 6",
    )


def resolve_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """Return the sorted layer numbers that *layers* selects in a model of *depth* blocks.

    *layers* is ``"all"``, a number, a list of numbers, or text: numbers with commas, ``"0,8"``, a slice, ``"8:24"`` or
    ``"::4"``, or ``"every 6"`` for the last layer of each six, ``"5::6"``. Negative numbers count from the end, as in
    Python.

    >>> resolve_layers("all", 3), resolve_layers([0, -1], 12), resolve_layers("2:8:3", 12), resolve_layers("0, 8", 12)
    ((0, 1, 2), (0, 11), (2, 5), (0, 8))

    Raises
    ------
    SiteError
        The model does not have a layer, or none is selected.
    ConfigError
        See `plain_layers`.
    """
    layers = plain_layers(layers)
    if isinstance(layers, str):
        if layers == "all":
            return tuple(range(depth))
        if layers.startswith("every"):
            step = int(layers.removeprefix("every"))
            layers = f"{step - 1}::{step}"
        parts = [int(part) if part else None for part in layers.split(":")]
        if parts[2:] == [0]:
            raise ConfigError(f"layers {layers!r} has a step of 0", expected="a step other than 0")
        found = tuple(sorted(range(depth)[slice(*parts)]))
    else:
        asked = [layers] if isinstance(layers, int) else layers
        bad = [layer for layer in asked if not -depth <= layer < depth]
        if bad:
            raise SiteError(
                f"the model has no layer {', '.join(map(str, bad))}",
                expected=f"layers from 0 to {depth - 1}, or from -{depth} to -1 counted from the end",
                found=str(asked),
            )
        found = tuple(sorted({layer % depth for layer in asked}))
    if not found:
        raise SiteError(f"layers {layers!r} selects no layer of {depth}", remedy="write all, or a wider range")
    return found
