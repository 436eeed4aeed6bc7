"""Checks of queries, keys, values and results of heads, by changing one head of one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.attention import Heads, find_heads
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.hook_scope import hook_scope
from flexcache.hooks.locate.names import modules_by_path
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.hooks.read.activation_hooks import ActivationHooks, batch_shape
from flexcache.hooks.read.measure import Example, example_inputs
from flexcache.site import Site

SHAPE = (2, 11)
"""Sequences and tokens of the example; the first sequence is changed, the second must stay the same."""
POSITION = 4
"""The token whose query, key or value is changed: neither the first nor the last, of at least six."""
STRENGTHS = (64.0, 4096.0)
"""Sizes of the change to try, in units of the largest value: a model may attend almost evenly."""
ROUNDINGS = 4
"""Differences below this multiple of those between two equal forwards count as none."""
PROPORTION = 0.05
"""The relative difference allowed between an effect and that of the opposite change, for both to be in proportion."""
FOLLOWS = {
    "q": "at that token and in that head only",
    "k": "at other tokens too, in the heads that share the key, not in proportion",
    "v": "at other tokens too, in the heads that share the value, in proportion",
}


def check_heads(model: nn.Module, points: Sequence[HookPoint], example: Example | None = None) -> None:
    """Check ``q``, ``k``, ``v`` and ``z`` among *points* by changing one head of one token.

    In the first layer of each kind, ``z`` is read after the change:

    - another query changes ``z`` at its own token and in its own head only;
    - another key changes ``z`` of other tokens too, in the heads that share it, and not in proportion;
    - another value does so in proportion: the opposite change has the opposite effect.

    A fused projection that is split in the wrong way, or by the wrong heads, fails the check, whatever norms, rotary
    positions, biases or gates the model has.

    Raises
    ------
    SiteError
        A site is not what its name says. The error gives the site, the layer and the change.
    """
    asked = [
        point
        for point in points
        if point.array in ("q", "k", "v", "z") and point.layer is not None and not point.gradient
    ]
    seen = set()
    for point in asked:
        for place in _kinds(model, point):
            if place.key not in seen:
                seen.add(place.key)
                _HeadCheck(model, place, example).check()


class _ChangedHead(NamedTuple):
    key: Any
    point: HookPoint
    z: HookPoint
    attention: nn.Module


def _kinds(model: nn.Module, point: HookPoint) -> tuple[_ChangedHead, ...]:
    """Return the change for a hook point: in the point itself, or for ``z`` in the queries if the layer has them."""
    assert point.layer is not None
    path, blocks = find_blocks(model)
    try:
        changed = find_hook_points(model, Site("q" if point.array == "z" else point.array), point.layer)[0]
        z = point if point.array == "z" else find_hook_points(model, Site("z"), point.layer)[0]
    except SiteError:
        if point.array == "z":  # latent or linear attention: the sum of attn_out is the only check
            return ()
        raise
    if point.array != "z":
        changed = point
    prefix = f"{path}.{point.layer}."
    attention = modules_by_path(model)[changed.module.rpartition(".")[0]]
    key = (
        point.array,
        changed.module.removeprefix(prefix),
        changed.fused_slice,
        type(blocks[point.layer]),
        type(attention),
    )
    return (_ChangedHead(key, changed, z, attention),)


class _HeadCheck:
    def __init__(self, model: nn.Module, place: _ChangedHead, example: Example | None) -> None:
        self.model, self.changed = model, place
        self.inputs = example_inputs(model, example, SHAPE)
        args = () if isinstance(self.inputs, Mapping) else self.inputs
        args = args if isinstance(args, tuple) else (args,)
        self.shape = batch_shape(model, args, self.inputs if isinstance(self.inputs, Mapping) else {})
        heads = find_heads(place.attention)
        if heads is None:
            raise self._error("the number of heads is not known", "num_heads of the attention or its configuration")
        self.heads: Heads = heads

    def check(self) -> None:
        for strength in STRENGTHS:
            if self._shows(strength):
                return
        raise self._error(
            f"{self.changed.point.array} of layer {self.changed.point.layer} is not what its name says",
            f"a change of one head at one token to show in {self.changed.z}",
            "nothing",
        )

    def _shows(self, strength: float) -> bool:
        """Return False if a change has no effect; raise SiteError if it has the wrong one."""
        site = self.changed.point.array
        before, there, opposite = self._z(0), self._z(strength), self._z(-strength)
        noise = float((self._z(0) - before).abs().max())  # from kernels that add in a different order each time
        rows, positions, heads = (set(found.tolist()) for found in self._touched(before, there, ROUNDINGS * noise))
        if not rows:
            return False
        group = self.heads.queries // self._groups
        own = set(range(self.heads.queries - group, self.heads.queries))
        other_positions = positions - {POSITION}
        one_way, other_way = there.double() - before, opposite.double() - before
        proportional = bool((one_way + other_way).abs().max() <= PROPORTION * one_way.abs().max())
        wrong = {
            "another sequence": rows != {0},
            "other heads": not self._mixes and not heads <= own,
            "other tokens": site == "q" and bool(other_positions),
            "no other token": site != "q" and not other_positions,
            "in proportion": site == "k" and proportional,
            "not in proportion": site == "v" and not proportional,
        }
        if any(wrong.values()):
            found = ", ".join(name for name, is_so in wrong.items() if is_so)
            raise self._error(
                f"{site} of layer {self.changed.point.layer} is not what its name says",
                f"a change of one head at one token to show {FOLLOWS[site]}",
                found,
            )
        return True

    @property
    def _groups(self) -> int:
        return self.heads.queries if self.changed.point.array == "q" else self.heads.keys

    @property
    def _mixes(self) -> bool:
        """True if one norm over all heads (OLMo 2) makes them depend on each other."""
        norm = getattr(self.changed.attention, f"{self.changed.point.array}_norm", None)
        weight = getattr(norm, "weight", None)
        return weight is not None and weight.numel() == self._width and self._groups > 1

    def _touched(self, before: torch.Tensor, after: torch.Tensor, bound: float) -> tuple[torch.Tensor, ...]:
        if before.shape[-1] % self.heads.queries:
            raise self._error(
                "the results of the heads cannot be told apart",
                f"a multiple of {self.heads.queries} heads",
                f"{before.shape[-1]} features at {self.changed.z}",
            )
        change = (after - before).abs().unflatten(-1, (self.heads.queries, -1)).amax(-1)
        return (change > bound).nonzero(as_tuple=True)

    def _z(self, strength: float) -> torch.Tensor:
        """Return z, shape (sequences, tokens, features), after a change of the given strength."""
        read: list[torch.Tensor] = []
        point, given = self.changed.point, self.inputs
        changing = modules_by_path(self.model)[point.module].register_forward_hook(
            lambda _, args, output: point.replace_output(output, self._change(point.read_output(output), strength))
        )
        with (
            hook_scope([changing]),
            ActivationHooks(self.model, (self.changed.z,), lambda _, values: read.append(values.clone())) as opened,
        ):
            if isinstance(given, Mapping):
                opened.forward(**given)
            else:
                opened.forward(*(given if isinstance(given, tuple) else (given,)))
        return read[0].flatten(2)

    def _change(self, values: torch.Tensor, strength: float) -> torch.Tensor:
        shaped = self.changed.point.reshape_to_tokens(values, self.shape).clone()
        self._width = shaped.shape[-1]
        if shaped.shape[-1] % self._groups:
            raise self._error(
                "the heads cannot be told apart", f"a multiple of {self._groups}", f"{shaped.shape[-1]} features"
            )
        apart = shaped.unflatten(-1, (self._groups, -1))
        noise = torch.randn(apart.shape[-1], generator=torch.Generator().manual_seed(0)).to(apart)
        apart[0, POSITION, -1] += strength * max(1.0, float(values.abs().max())) * noise
        return shaped.reshape(values.shape)

    def _error(self, message: str, expected: str, found: str | None = None) -> SiteError:
        return SiteError(
            message,
            where=str(self.changed.point),
            expected=expected,
            found=found,
            remedy=f"give the module path {self.changed.point.module} as site instead",
        )
