"""Gather the shards of an activation from the ranks of a distributed model to the one rank that writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from flexcache.errors import LayoutError, SiteError
from flexcache.hooks.locate.blocks import REMOTE_BLOCK, find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import modules_by_path, unwrap_model
from flexcache.hooks.read.activation_hooks import ActivationHooks, accepts_keyword, batch_shape
from flexcache.hooks.read.measure import EXAMPLE_SHAPE, ExampleRun, example_inputs
from flexcache.parallel.distribution import Distribution, LocalPiece
from flexcache.parallel.header import ActivationKey
from flexcache.parallel.layout import Layout, localize
from flexcache.parallel.meta_model import ShapeProbe
from flexcache.parallel.peers import exchange_tensors, exchange_values
from flexcache.parallel.stages import Stages
from flexcache.site import PATTERN

AGREEMENT = 1e-3
"""Bound on the difference of copies of a gradient, relative to the sum of its magnitudes."""


@dataclass(frozen=True)
class Shards:
    """The split of an activation over the tensor-parallel ranks along a *dim*, counted from the end.

    *sizes* are those of each rank's shard of a dim of features; None for the dim of tokens, in equal shards.
    """

    dim: int
    sizes: tuple[int, ...] | None


class Gathering:
    """Gathers whole activations of a model that several ranks hold.

    `learn_sharding` finds out how each activation is sharded, by one small forward that all ranks run alike, and checks
    that ranks which seem to hold all of it hold the same values. Then `gather_activation` sends the shards of an
    activation to the one rank that owns it, inside the hook. Owners take turns, so that every rank writes its share.
    """

    def __init__(self, model: nn.Module, distribution: Distribution) -> None:
        self._model = model
        self._distribution = distribution
        mesh = distribution.mesh
        here = mesh.coordinate
        self._peers = tuple(rank for rank, at in enumerate(mesh.coordinates) if (at.pp, at.dp) == (here.pp, here.dp))
        self._here = mesh.rank
        self._named = modules_by_path(model)
        self._shards: dict[HookPoint, Shards | None] = {}
        self._keys: dict[HookPoint, ActivationKey] = {}
        self._compared: set[HookPoint] = set()
        self.stop = mesh.sizes.pp == 1
        self._stream = self._residual_stream()
        self.masked = True
        """False if the forward takes no attention mask: where tokens are sharded, and in pipeline stages of torch."""

    @property
    def tensor(self) -> int:
        """Number of tensor-parallel ranks."""
        return len(self._peers)

    def owned_points(self, points: Iterable[HookPoint]) -> tuple[HookPoint, ...]:
        """Return the points on modules of this rank's pipeline stage."""
        return tuple(point for point in points if self._has(point.module))

    def written_points(self, points: Sequence[HookPoint]) -> tuple[HookPoint, ...]:
        """Return the points whose activations this rank writes: every n-th of its stage's, for n ranks."""
        return tuple(point for point in self.owned_points(points) if self._owner(points.index(point)) == self._here)

    def position_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return position ids as a keyword of the forward, since a rank may see only a shard of the tokens."""
        if self.tensor == 1 or not accepts_keyword(self._model, "position_ids"):
            return {}
        return {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}

    def padded_length(self, longest: int) -> int:
        """Return the length to which sequences are padded, so that all ranks have equal shards of the tokens."""
        return -(-longest // self.tensor) * self.tensor

    # Learning

    def learn_sharding(self, points: Sequence[HookPoint]) -> None:
        """Learn how activations at *points* are sharded, by a small forward unless it is known. Collective."""
        plain = dict.fromkeys(replace(point, gradient=False) for point in points)
        if not self._keys.keys() >= plain.keys():
            self.read_example(self._model, tuple(plain))

    def read_example(self, model: nn.Module, points: Sequence[HookPoint], example: Any = None) -> ExampleRun:
        """Return whole activations of a small example at *points*, on every rank, and learn how they are sharded.

        Collective. LayoutError if the sharding of an activation cannot be inferred, on one rank at least.
        """
        mesh, distribution = self._distribution.mesh, self._distribution
        shape = (EXAMPLE_SHAPE[0], EXAMPLE_SHAPE[1] * self.tensor)
        inputs = example_inputs(model, example, shape)
        if isinstance(inputs, Mapping):
            inputs = {**inputs, **self.position_inputs(inputs["input_ids"])}
            shape = batch_shape(model, (), inputs)
        raw: dict[HookPoint, torch.Tensor] = {}
        known: dict[HookPoint, Any] = {}

        def sink(point: HookPoint, tensor: torch.Tensor) -> None:
            known[point] = local = localize(tensor, str(point))
            raw[point] = local.tensor.clone()

        mine = self.owned_points(dict.fromkeys((*points, *self._stream)))
        with ActivationHooks(model, mine, sink, stop=False, shape=False) as opened:
            output = opened.forward(**inputs)
        for point in (*points, *self._stream):
            self._keys.setdefault(point, ActivationKey(len(self._keys), 0))
        keys = self._keys
        probes = [
            ShapeProbe(keys[point].hook, self._named[point.module], partial(point.read, self._named[point.module]))
            for point in keys
            if self._has(point.module)
        ]
        pieces, layouts = [], {}
        for root, args, kwargs, named in self._roots(model, inputs):
            here = [probe for probe in probes if probe.module in named]
            distribution.begin_forward(root, args, kwargs)
            for point in mine:
                if self._named[point.module] in named:
                    local = replace(known[point], tensor=raw[point])
                    layouts[point] = distribution.layout(keys[point], local, str(point), None, partial(list, here))
                    pieces.append(LocalPiece(keys[point], 0, raw[point], layouts[point]))
            distribution.end_forward()
        whole, _ = distribution.assemble_activations(pieces, range(len(mesh.ranks)), [str(point) for point in keys])
        self._store_sharding(mine, raw, layouts, shape)
        sharded = any(held is not None and held.sizes is None for held in self._shards.values())
        if self.masked and (sharded or isinstance(model, Stages)):
            self.masked = False
            self._check_causal(model, inputs)
        found = {}
        for point in points:
            tensor = whole[keys[point]]
            rows = shape[0] if tensor.shape[0] == shape[0] * mesh.sizes.dp else shape[0] * shape[1]
            found[point] = point.reshape_to_tokens(tensor[:rows], shape)
        return ExampleRun(inputs, found, output)

    def _roots(
        self, model: nn.Module, inputs: Any
    ) -> list[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], set[nn.Module]]]:
        """Return the root modules whose inputs determine shapes, with those inputs and the set of modules in each."""
        if isinstance(model, Stages):
            parts = zip(model.parts, model.inputs, strict=True)
            return [(part, (given,), {}, set(modules_by_path(part).values())) for part, given in parts]
        return [(unwrap_model(model), (), inputs, set(self._named.values()))]

    def _store_sharding(
        self,
        points: Sequence[HookPoint],
        raw: Mapping[HookPoint, torch.Tensor],
        layouts: Mapping[HookPoint, Layout],
        shape: Sequence[int],
    ) -> None:
        """Store the sharding of each activation, with the size of each rank's shard."""
        sharded = [point for point in points if layouts[point].sharded is not None]
        dims = [int(layouts[point].sharded or 0) for point in sharded]
        own = [raw[point].shape[dim] for point, dim in zip(sharded, dims, strict=True)]
        sizes = (
            exchange_values(self._distribution.group, self._peers, self._here, own)
            if own and self.tensor > 1
            else [own]
        )
        self._shards |= dict.fromkeys(points)
        for number, (point, dim) in enumerate(zip(sharded, dims, strict=True)):
            whole = layouts[point].shape
            parts = tuple(told[number] for told in sizes)
            if sum(parts) != whole[dim]:
                raise LayoutError(
                    "the shards of an activation do not add up",
                    where=str(point),
                    expected=f"{whole[dim]} along dim {dim}",
                    found=" + ".join(map(str, parts)),
                )
            tokens = dim == (1 if len(whole) > 2 and whole[0] != shape[0] * shape[1] else 0) and point.side != PATTERN
            self._shards[point] = Shards(dim - len(whole), None if tokens else parts)

    def _residual_stream(self) -> tuple[HookPoint, ...]:
        """Return points before the first block and after the last, which show if tokens are sharded."""
        if self.tensor == 1:
            return ()
        try:
            path, blocks = find_blocks(self._model)
        except SiteError:
            return ()
        return HookPoint("stream", None, f"{path}.0", "input"), HookPoint("stream", None, f"{path}.{len(blocks) - 1}")

    def _check_causal(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        """Raise LayoutError if a model without an attention mask lets a token change activations of earlier tokens."""
        others = dict(inputs)
        others["input_ids"] = torch.cat([inputs["input_ids"][:, :-1], inputs["input_ids"][:, :1]], dim=1)
        path, blocks = find_blocks(model)
        last = self.owned_points([HookPoint("stream", None, f"{path}.{len(blocks) - 1}")])
        read: list[torch.Tensor] = []

        def sink(point: HookPoint, tensor: torch.Tensor) -> None:
            read.append(localize(tensor, str(point)).tensor.clone())

        with ActivationHooks(model, last, sink, stop=False, shape=False) as opened:
            opened.forward(**inputs)
            opened.forward(**others)
        whole = any(held is None for held in [self._shards.get(point) for point in last])
        ends = whole or self._here == self._peers[-1]  # this rank has the last token, which may change
        earlier = [values[:, :-1] if ends else values for values in read]
        changed = bool(earlier) and not torch.allclose(earlier[0], earlier[1], rtol=1e-4, atol=1e-5)
        if any(self._distribution.gather_objects(changed)):
            raise LayoutError(
                "a model that is distributed this way takes no attention mask, and needs one",
                where=type(unwrap_model(model)).__name__,
                expected="causal attention, which never sees padding at the right",
                found="activations that depend on later tokens",
                remedy="distribute it without sequence parallelism, or with transformers itself",
            )

    # Gathering

    def gather_activation(self, point: HookPoint, number: int, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the whole activation on the rank that owns hook point *number*, None on the others.

        Collective on the tensor-parallel ranks.
        """
        local = localize(tensor, str(point)).tensor
        owner, shards = self._owner(number), self._shards[replace(point, gradient=False)]
        if shards is None:
            if point.gradient and point not in self._compared and self.tensor > 1:
                self._check_equal(point, local)
            return local if owner == self._here else None
        if owner != self._here:
            exchange_tensors(self._distribution.group, [(owner, local)], [])
            return None
        pieces = []
        for place, peer in enumerate(self._peers):
            shape = list(local.shape)
            if shards.sizes is not None:
                shape[shards.dim] = shards.sizes[place]
            pieces.append(local if peer == self._here else local.new_empty(shape))
        others = [(peer, piece) for peer, piece in zip(self._peers, pieces, strict=True) if peer != self._here]
        exchange_tensors(self._distribution.group, [], others)
        return torch.cat(pieces, dim=shards.dim)

    def _check_equal(self, point: HookPoint, gradient: torch.Tensor) -> None:
        """Raise LayoutError if each rank has only the part of a gradient that flows through its own shard."""
        self._compared.add(point)
        bits = torch.stack([gradient.double().sum(), gradient.double().abs().sum()]).cpu().view(torch.int64)
        told = exchange_values(self._distribution.group, self._peers, self._here, bits.tolist())
        sums = torch.tensor(told).view(torch.float64)
        if (sums - sums[0]).abs().max() > AGREEMENT * sums[0, 1]:
            raise LayoutError(
                "a gradient is not the same on all tensor-parallel ranks",
                where=str(point),
                expected="copies of the whole gradient, or shards of it",
                found="sums " + ", ".join(f"{value:.4g}" for value in sums[:, 0].tolist()),
                remedy="ask for the gradient of the residual stream, or of a sharded activation",
            )

    def remote_modules(self) -> set[str]:
        """Return the names of modules that only other pipeline stages have. Collective."""
        if self.stop:
            return set()
        own = [name for name in self._named if name and self._has(name)]
        return set().union(*self._distribution.gather_objects(own)) - set(own)

    def _has(self, module: str) -> bool:
        return module in self._named and type(self._named[module]).__name__ != REMOTE_BLOCK

    def _owner(self, number: int) -> int:
        return self._peers[number % len(self._peers)]
