"""Proves by intervention that queries, keys, values and results of heads are what their names promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.attention import Heads, find_heads
from flexcache.hooks.blocks import find_blocks
from flexcache.hooks.locate import locate
from flexcache.hooks.measure import Example, example_inputs
from flexcache.hooks.names import modules
from flexcache.hooks.tap import Tap
from flexcache.hooks.taps import Taps, batch_shape
from flexcache.site import Site

SHAPE = (2, 11)
"""Sequences and tokens of the example; the first sequence is changed, the second must stay as it was."""
POSITION = 4
"""The token whose query, key or value is changed: neither the first nor the last, of six or more."""
STRENGTHS = (64.0, 4096.0)
"""Of the change, in units of the largest value, until it shows: a model may attend almost evenly."""
ROUNDINGS = 4
"""Below as many times what differs between two equal forwards, nothing has changed."""
PROPORTION = 0.05
"""By how much an effect and the opposite one may differ, of its size, and be in proportion."""
FOLLOWS = {
    "q": "at that token and in that head only",
    "k": "at other tokens too, in the heads that share the key, not in proportion",
    "v": "at other tokens too, in the heads that share the value, in proportion",
}


def check_heads(model: nn.Module, taps: Sequence[Tap], example: Example | None = None) -> None:
    """Check ``q``, ``k``, ``v`` and ``z`` among *taps* by changing one head of one token, and seeing what follows.

    In the first layer of each kind, with ``z`` read after the change:

    - a query of another value changes ``z`` at its own token and in its own head, and nowhere else;
    - a key changes ``z`` of other tokens as well, in the heads that share it, and not in proportion;
    - a value does so in proportion: the opposite change has the opposite effect.

    So a fused projection that is split wrongly, or by the wrong heads, is found out, whatever norms, rotary positions,
    biases or gates the model has.

    Raises
    ------
    SiteError
        With the site, the layer, and what was changed where.
    """
    asked = [tap for tap in taps if tap.array in ("q", "k", "v", "z") and tap.layer is not None and not tap.gradient]
    seen = set()
    for tap in asked:
        for place in _kinds(model, tap):
            if place.key not in seen:
                seen.add(place.key)
                _Trial(model, place, example).check()


class _Place(NamedTuple):
    key: Any
    tap: Tap
    z: Tap
    attention: nn.Module


def _kinds(model: nn.Module, tap: Tap) -> tuple[_Place, ...]:
    """Return what to change for a tap: itself, and for ``z`` the queries, where the layer has them."""
    assert tap.layer is not None
    path, blocks = find_blocks(model)
    try:
        changed = locate(model, Site("q" if tap.array == "z" else tap.array), tap.layer)[0]
        z = tap if tap.array == "z" else locate(model, Site("z"), tap.layer)[0]
    except SiteError:
        if tap.array == "z":  # latent or linear attention: the sum that attn_out is in says what can be said
            return ()
        raise
    if tap.array != "z":
        changed = tap
    prefix = f"{path}.{tap.layer}."
    attention = modules(model)[changed.module.rpartition(".")[0]]
    key = (tap.array, changed.module.removeprefix(prefix), changed.slots, type(blocks[tap.layer]), type(attention))
    return (_Place(key, changed, z, attention),)


class _Trial:
    def __init__(self, model: nn.Module, place: _Place, example: Example | None) -> None:
        self.model, self.place = model, place
        self.inputs = example_inputs(model, example, SHAPE)
        args = () if isinstance(self.inputs, Mapping) else self.inputs
        args = args if isinstance(args, tuple) else (args,)
        self.shape = batch_shape(model, args, self.inputs if isinstance(self.inputs, Mapping) else {})
        heads = find_heads(place.attention)
        if heads is None:
            raise self._error(
                "how many heads there are is not known", "num_heads of the attention or its configuration"
            )
        self.heads: Heads = heads

    def check(self) -> None:
        for strength in STRENGTHS:
            if self._shows(strength):
                return
        raise self._error(
            f"{self.place.tap.array} of layer {self.place.tap.layer} is not what its name promises",
            f"a change of one head at one token to show in {self.place.z}",
            "nothing",
        )

    def _shows(self, strength: float) -> bool:
        """Whether a change shows at all; if it does, it must show as it should."""
        site = self.place.tap.array
        before, there, opposite = self._z(0), self._z(strength), self._z(-strength)
        noise = float((self._z(0) - before).abs().max())  # of kernels that add in another order every time
        rows, positions, heads = (set(found.tolist()) for found in self._touched(before, there, ROUNDINGS * noise))
        if not rows:
            return False
        group = self.heads.queries // self._groups
        own = set(range(self.heads.queries - group, self.heads.queries))
        elsewhere = positions - {POSITION}
        one_way, other_way = there.double() - before, opposite.double() - before
        proportional = bool((one_way + other_way).abs().max() <= PROPORTION * one_way.abs().max())
        wrong = {
            "another sequence": rows != {0},
            "other heads": not self._mixes and not heads <= own,
            "other tokens": site == "q" and bool(elsewhere),
            "no other token": site != "q" and not elsewhere,
            "in proportion": site == "k" and proportional,
            "not in proportion": site == "v" and not proportional,
        }
        if any(wrong.values()):
            found = ", ".join(name for name, is_so in wrong.items() if is_so)
            raise self._error(
                f"{site} of layer {self.place.tap.layer} is not what its name promises",
                f"a change of one head at one token to show {FOLLOWS[site]}",
                found,
            )
        return True

    @property
    def _groups(self) -> int:
        return self.heads.queries if self.place.tap.array == "q" else self.heads.keys

    @property
    def _mixes(self) -> bool:
        """Whether a norm over all heads together (OLMo 2) lets each depend on the others."""
        norm = getattr(self.place.attention, f"{self.place.tap.array}_norm", None)
        weight = getattr(norm, "weight", None)
        return weight is not None and weight.numel() == self._width and self._groups > 1

    def _touched(self, before: torch.Tensor, after: torch.Tensor, bound: float) -> tuple[torch.Tensor, ...]:
        if before.shape[-1] % self.heads.queries:
            raise self._error(
                "the results of the heads cannot be told apart",
                f"a multiple of {self.heads.queries} heads",
                f"{before.shape[-1]} features at {self.place.z}",
            )
        change = (after - before).abs().unflatten(-1, (self.heads.queries, -1)).amax(-1)
        return (change > bound).nonzero(as_tuple=True)

    def _z(self, strength: float) -> torch.Tensor:
        """Return z, shape (sequences, tokens, features), after a change of some strength."""
        read: list[torch.Tensor] = []
        with _changing(self.model, self.place.tap, lambda values: self._change(values, strength)):  # noqa: SIM117
            with Taps(self.model, (self.place.z,), lambda _, values: read.append(values.clone())) as opened:
                given: Any = self.inputs
                if isinstance(given, Mapping):
                    opened.forward(**given)
                else:
                    opened.forward(*(given if isinstance(given, tuple) else (given,)))
        return read[0].flatten(2)

    def _change(self, values: torch.Tensor, strength: float) -> torch.Tensor:
        shaped = self.place.tap.shaped(values, self.shape).clone()
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
            where=str(self.place.tap),
            expected=expected,
            found=found,
            remedy=f"give the module path {self.place.tap.module} as site instead",
        )


@contextmanager
def _changing(model: nn.Module, tap: Tap, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    handle = modules(model)[tap.module].register_forward_hook(
        lambda _, args, output: tap.into_output(output, change(tap.from_output(output)))
    )
    try:
        yield
    finally:
        handle.remove()
