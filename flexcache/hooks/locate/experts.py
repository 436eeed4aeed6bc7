"""Experts of a mixture: the choice of a router for each token, and the part of each chosen expert in the output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.site import ExpertSide

UP, GATED_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"
"""Names of the weights of all experts in one parameter, with the expert as the first dim."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights that are not quantized."""


class RoutedTokens(NamedTuple):
    """Tokens with the experts that a router chose for them, in the order of their numbers.

    Attributes
    ----------
    hidden : Tensor, shape (tokens, hidden)
    numbers, weights : Tensor, shape (tokens, chosen)
        The number of each chosen expert, ascending, and the factor of its output.
    """

    hidden: torch.Tensor
    numbers: torch.Tensor
    weights: torch.Tensor


def takes_choice(module: nn.Module) -> bool:
    """Return True if one module computes all experts, from tokens, numbers of experts, and weights."""
    return type(module).forward is not nn.Module.forward and len(_parameters(module)) >= 3


def has_neurons(module: nn.Module) -> bool:
    """Return True if the experts of a module are an activated projection and a down-projection, each one parameter."""
    weights = (getattr(module, name, None) for name in (_up(module), DOWN))
    return hasattr(module, "act_fn" if _up(module) == UP else "_apply_gate") and all(
        isinstance(weight, nn.Parameter) and weight.ndim == 3 and weight.dtype in DTYPES for weight in weights
    )


def read_experts(
    module: nn.Module, side: ExpertSide, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> torch.Tensor:
    """Return what an experts module does for each token and chosen expert, shape (tokens, chosen, …).

    ``choice`` are the numbers of the experts in float32, ``weights`` their factors, ``neurons`` the inputs of their
    down-projections, and ``summands`` their outputs times the factors: the experts module adds these up. Summands are
    computed by the module itself, on one pair of a token and an expert in each row. ``projections``, of shape (tokens,
    chosen, 2, hidden), are summands again, made from the neurons, and the same times the ratio of the magnitudes that
    were added up to their sum. Experts are in the order of their numbers, so that rounding of two almost equal weights
    does not exchange them.

    Raises
    ------
    SiteError
        The module is not called with tokens, numbers and weights; or several processes share its weights, for neurons.
    """
    hidden, index, weights = routed_tokens(module, args, kwargs, where)
    if side == "choice":
        return index.float()
    if side == "weights":
        return weights
    if hidden.is_meta:
        return hidden.new_empty(*index.shape, *_features(module, side, hidden.shape[-1]))
    if side == "neurons":
        return expert_neurons(module, hidden, index, where)
    if side == "projections":
        return _projections(module, expert_neurons(module, hidden, index, where), index, weights)
    with torch.no_grad():
        pairs = hidden.repeat_interleave(index.shape[1], dim=0)
        made = module.forward(pairs, index.reshape(-1, 1), weights.reshape(-1, 1))
    return made.reshape(*index.shape, -1)


def routed_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> RoutedTokens:
    """Return the tokens that an experts module is called with, and their experts in the order of their numbers.

    Raises
    ------
    SiteError
        The module is called with something else.
    """
    names = _parameters(module)[:3]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    values = [value for value in map(given.get, names) if isinstance(value, torch.Tensor)]
    if len(values) < 3 or values[1].is_floating_point() or values[1].ndim != 2 or values[1].shape != values[2].shape:
        raise SiteError(
            "the experts are not called with the choice of the router",
            where=where,
            expected="tokens, numbers of experts (tokens, chosen), and weights of the same shape",
            found=", ".join(f"{tuple(value.shape)} of {value.dtype}" for value in values) or "no tensors",
            remedy="read the experts module as a whole, its router, or mlp_out",
        )
    hidden, index, weights = values
    order = index.argsort(dim=-1, stable=True)
    return RoutedTokens(hidden.reshape(-1, hidden.shape[-1]), index.gather(1, order), weights.gather(1, order))


def expert_neurons(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, where: str) -> torch.Tensor:
    """Return the inputs of the down-projections of the chosen experts, shape (tokens, chosen, neurons).

    Raises
    ------
    SiteError
        Several processes share the weights.
    """
    up = _up(module)
    if any(type(getattr(module, name).data) is not torch.Tensor for name in (up, DOWN)):
        raise SiteError(
            "the neurons of experts cannot be read where several processes share their weights",
            where=where,
            expected="all weights of the experts on each rank, at least while the block runs",
            remedy="leave mlp_post out, and store expert_out; or distribute the model by FSDP, or by pipeline stages",
        )
    activate: Callable[[torch.Tensor], torch.Tensor] = getattr(module, "act_fn" if up == UP else "_apply_gate")

    def neurons(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return activate(project(module, up, expert, tokens))

    with torch.no_grad():
        return map_experts(hidden.repeat_interleave(index.shape[1], dim=0), index, neurons)


def _projections(module: nn.Module, neurons: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows, norm = neurons.flatten(0, 1), getattr(module, "post_expert_norm", nn.Identity())
    with torch.no_grad():
        plain = map_experts(rows, index, lambda expert, values: project(module, DOWN, expert, values))
        added = map_experts(rows.abs(), index, lambda expert, values: project(module, DOWN, expert, values, True))
        made = norm(plain).float() * weights[..., None]
    ratio = added.float().norm(dim=-1, keepdim=True) / plain.float().norm(dim=-1, keepdim=True)
    return torch.stack([made, made * ratio], dim=-2)


def map_experts(
    values: torch.Tensor, index: torch.Tensor, function: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return ``function(expert, rows)`` of the rows of each expert, in the order of the pairs, by token and slot.

    *values* have one row for each element of *index*, shape (tokens, chosen).
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    parts = values[order].split(flat.bincount().tolist())
    made = torch.cat([function(expert, part) for expert, part in enumerate(parts) if len(part)])
    result = torch.empty_like(made)
    result[order] = made
    return result.reshape(*index.shape, -1)


def project(module: nn.Module, name: str, expert: int, rows: torch.Tensor, magnitudes: bool = False) -> torch.Tensor:
    """Return the projection *name* of one expert, with its bias if it has one.

    With *magnitudes*, the weights are replaced by their absolute values, and there is no bias.
    """
    weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    weight, bias = (weight.abs(), None) if magnitudes else (weight, bias)
    made = rows.to(weight.dtype) @ (weight if _transposed(module) else weight.T)
    return made if bias is None else made + bias[expert]


def _features(module: nn.Module, side: ExpertSide, width: int) -> tuple[int, ...]:
    if side == "neurons":
        return (getattr(module, DOWN).shape[1 if _transposed(module) else 2],)
    return (2, width) if side == "projections" else (width,)


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _up(module: nn.Module) -> str:
    return GATED_UP if hasattr(module, GATED_UP) else UP


def _transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))
