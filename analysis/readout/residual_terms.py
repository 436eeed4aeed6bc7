"""Terms of the residual stream: what each head, attention bias and MLP adds to it, read from a store."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.readout.frozen_norm import Floats, FrozenNorm
from flexcache.errors import AnalysisError
from flexcache.hooks import find_hook_points
from flexcache.hooks.locate.head_count import count_heads
from flexcache.hooks.locate.names import modules_by_path
from flexcache.site import Site
from flexcache.store.read.store import Store


class Component(NamedTuple):
    """A named term of a logit.

    >>> Component("head", 3, 5).label
    'layer 3 head 5'
    >>> Component("logit bias").label
    'logit bias'
    """

    kind: str
    layer: int = -1
    head: int = -1

    @property
    def label(self) -> str:
        """The name of the term in results."""
        if self.kind == "head":
            return f"layer {self.layer} head {self.head}"
        return self.kind if self.layer < 0 else f"layer {self.layer} {self.kind}"


@dataclass(frozen=True)
class Projection:
    """Attention's output projection of one layer, its heads, and the norm after it, if there is one."""

    weight: Floats = field(repr=False)
    bias: Floats
    heads: int
    post: FrozenNorm | None


class Term(NamedTuple):
    """Contributions of one or several components to a logit, and the vector that they add to the residual stream.

    Attributes
    ----------
    contributions : ndarray, shape (rows, components)
    added : ndarray, shape (rows, hidden)
    magnitude : ndarray, shape (rows, hidden)
        Sum of the absolute values that were added up, for the bound on rounding.
    """

    components: tuple[Component, ...]
    contributions: Floats
    added: Floats
    magnitude: Floats


class ResidualTerms:
    """The terms of the residual stream from a layer on, as a store holds them.

    ::

        terms = ResidualTerms(store, model, heads=True)
        for term in terms.read_terms(rows, directions): ...

    Parameters
    ----------
    heads
        Split attention into heads, which needs ``z``; None if ``z`` is stored.

    Attributes
    ----------
    first : int
        The first layer whose terms are stored, as those of all later layers are.

    Raises
    ------
    AnalysisError
        The store lacks the terms of the last layer, or the stream that the first ones are added to.
    """

    def __init__(self, store: Store, model: nn.Module, heads: bool | None) -> None:
        self.store, self.model = store, model
        self.depth = len(find_hook_points(model, Site("resid_post")))
        held = {name: set(store.layers(name)) if name in store.arrays else set() for name in SITES}
        if heads is None:
            heads = bool(held["z"])
        self.heads, attention = heads, held["z"] if heads else held["attn_out"]
        whole = attention & held["mlp_out"]
        self.first = self.depth
        while self.first - 1 in whole:
            self.first -= 1
        before = self.first - 1 in held["resid_post"] or self.first in held["resid_pre"]
        start = before or (self.first == 0 and 0 in held["resid_post"])
        if self.first == self.depth or not start or self.depth - 1 not in held["resid_post"]:
            name = "z" if heads else "attn_out"
            raise AnalysisError(
                "the store does not hold the terms of the residual stream",
                where=str(store.path),
                expected=f"resid_post, {name} and mlp_out of the layers up to the last, {self.depth - 1}",
                found=", ".join(f"{site} {sorted(layers)}" for site, layers in held.items() if layers) or "none",
                remedy=f"capture with sites: [resid_post, {name}, mlp_out], layers: all",
            )

    def read_stream(self, layer: int, rows: NDArray[np.int64]) -> Floats:
        """Return the residual stream after a layer, float64, shape (rows, hidden)."""
        return self._read("resid_post", layer, rows)

    def read_terms(self, rows: NDArray[np.int64], directions: Floats) -> Iterator[Term]:
        """Yield the terms in the order in which they are added, with their contributions along *directions*.

        Parameters
        ----------
        directions
            One for each row, shape (rows, hidden).
        """
        first = [*self._read_layer(self.first, rows, directions)]
        before = self._read_before(rows, [term.added for term in first])
        start = Component("embedding" if self.first == 0 else f"layers before {self.first}")
        yield Term((start,), dot(before, directions)[:, None], before, np.abs(before))
        yield from first
        for layer in range(self.first + 1, self.depth):
            yield from self._read_layer(layer, rows, directions)

    def _read_before(self, rows: NDArray[np.int64], added: list[Floats]) -> Floats:
        if self.first and self.first - 1 in self.store.layers("resid_post"):
            return self._read("resid_post", self.first - 1, rows)
        if "resid_pre" in self.store.arrays and self.first in self.store.layers("resid_pre"):
            return self._read("resid_pre", self.first, rows)
        after: Floats = self._read("resid_post", self.first, rows) - sum(added)
        return after

    def _read_layer(self, layer: int, rows: NDArray[np.int64], directions: Floats) -> Iterator[Term]:
        if self.heads:
            yield self._split_heads(layer, rows, directions)
        for name, kind in (("attn_out", "attention"), ("mlp_out", "mlp")):
            if name == "mlp_out" or not self.heads:
                added = self._read(name, layer, rows)
                yield Term((Component(kind, layer),), dot(added, directions)[:, None], added, np.abs(added))

    def _split_heads(self, layer: int, rows: NDArray[np.int64], directions: Floats) -> Term:
        projection = self._projection(layer)
        z = self._read("z", layer, rows)
        bias = projection.bias[None].repeat(len(rows), 0)
        added, magnitude = z @ projection.weight.T + bias, np.abs(z) @ np.abs(projection.weight).T
        constant: Floats = np.zeros(len(rows))
        if projection.post is not None:
            scales = projection.post.measure_scales(added)
            added = projection.post.apply(added)
            magnitude = np.abs(scales[:, None] * projection.post.gain) * magnitude
            constant = directions @ projection.post.bias
            directions = projection.post.pull_back(directions, scales)
        by_feature = z * (directions @ projection.weight)
        by_head = by_feature.reshape(len(rows), projection.heads, -1).sum(-1)
        rest = (dot(bias, directions) + constant)[:, None]
        names = [Component("head", layer, head) for head in range(projection.heads)]
        return Term(
            (*names, Component("attention bias", layer)), np.hstack([by_head, rest]), added, np.abs(added) + magnitude
        )

    def _projection(self, layer: int) -> Projection:
        return _find_projection(self.model, layer, self.store.arrays["z"].features)

    def _read(self, site: str, layer: int, rows: NDArray[np.int64]) -> Floats:
        return self.store.read(site, layer, rows).astype(np.float64)


SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")


def dot(one: Floats, other: Floats) -> Floats:
    """Return the product of each row of one array with that of the other."""
    found: Floats = np.einsum("rf,rf->r", one, other)
    return found


def _find_projection(model: nn.Module, layer: int, features: int) -> Projection:
    named = modules_by_path(model)
    z, out = (find_hook_points(model, Site(name), layer)[0] for name in ("z", "attn_out"))
    heads, module = count_heads(model, "z", layer), named[z.module]
    if features % heads:
        raise AnalysisError(
            "the heads of z cannot be told apart", expected=f"a multiple of {heads} heads", found=f"{features} features"
        )
    weight, bias = _linear_map(module, features)
    around = out.module != z.module and not z.module.startswith(f"{out.module}.")
    return Projection(weight, bias, heads, FrozenNorm.of(named[out.module], len(bias)) if around else None)


def _linear_map(module: nn.Module, features: int) -> tuple[Floats, Floats]:
    """Return the weight, shape (hidden, features), and bias of a linear module of any class, by its own outputs."""
    if type(module) is nn.Linear:
        weight = module.weight.detach().double().cpu().numpy()
        return weight, np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().cpu().numpy()
    own = copy.deepcopy(module).double().cpu().eval()
    with torch.inference_mode():
        made = own(torch.cat([torch.zeros(1, features, dtype=torch.float64), torch.eye(features, dtype=torch.float64)]))
    values: Floats = (made[0] if isinstance(made, tuple) else made).numpy()
    return (values[1:] - values[0]).T, values[0]
