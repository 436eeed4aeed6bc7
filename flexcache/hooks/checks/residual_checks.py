"""Checks that sites are what their names say, by the algebra of the residual stream on a small batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.checks.block_checks import BLOCK_SITES, check_block_sites
from flexcache.hooks.checks.expert_checks import check_experts
from flexcache.hooks.checks.head_checks import check_heads
from flexcache.hooks.locate.aliases import CROSS_NORMS, NORM_PAIRS, find_submodule
from flexcache.hooks.locate.attention import PROJECTIONS
from flexcache.hooks.locate.blocks import find_blocks, is_remote_block
from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.hooks.read.measure import Example, ExampleReader, input_device, read_example
from flexcache.site import Side, Site

ALGEBRA = ("resid_pre", "resid_post", "attn_out", "mlp_out")
CROSS = "cross_attn_out"

ROUNDINGS = 4
"""The bound, in units of eps · (sum of magnitudes). Two additions, each rounded to half an eps, need one."""


def check_sites(
    model: nn.Module,
    points: Sequence[HookPoint],
    *,
    example: Example | None = None,
    reader: ExampleReader = read_example,
    alone: bool = True,
) -> None:
    """Check the standard sites among *points* by the algebra that defines them, on one forward of a small batch.

    For each layer whose ``attn_out`` or ``mlp_out`` is hooked, elementwise and in float32 arithmetic::

        resid_post[l] = resid_pre[l] + attn_out[l] + mlp_out[l]      to 4 · eps(dtype) · (sum of magnitudes)

    A decoder that attends to an encoder adds ``cross_attn_out[l]`` between the two. A block that normalizes last, like
    BERT's, has its norms between the sums. A term too small to make a difference proves nothing, and raises. If
    neighbouring layers are hooked, ``resid_post[l]`` must equal ``resid_pre[l + 1]`` bit for bit. Models that scale
    what they add (Granite) raise, since none of their modules returns the scaled values.

    Sites inside a block are checked by `check_block_sites`, those of experts by `check_experts`, and queries, keys and
    values by `check_heads` if *alone*: this process has the whole model. ``mlp_post`` without experts, ``embed`` and
    module paths have no algebra to check.

    ::

        points = find_hook_points(model, Site("resid_post"))
        check_sites(model, points)

    Raises
    ------
    SiteError
        A site is not what its name says. The error gives the site, the layer and the size of the deviation.
    """
    if input_device(model).type == "meta" and any(
        point.array in (*ALGEBRA, CROSS, *BLOCK_SITES, *PROJECTIONS) or point.of_experts for point in points
    ):
        raise SiteError("sites cannot be checked on the meta device", remedy="load the model's weights first")
    _check_stream(model, points, example, reader)
    check_block_sites(model, points, example=example, reader=reader)
    check_experts(model, points, example=example, reader=reader, alone=alone)
    if alone:
        check_heads(model, points, example)


def _check_stream(
    model: nn.Module, points: Sequence[HookPoint], example: Example | None, reader: ExampleReader
) -> None:
    """Check what a block adds to the residual stream, and that the stream reaches the next block unchanged."""
    standard = [point for point in points if point.array in (*ALGEBRA, CROSS) and point.layer is not None]
    layers = sorted({point.layer for point in standard if point.layer is not None})
    summed = sorted(
        {point.layer for point in standard if point.layer is not None and point.array in (*ALGEBRA[2:], CROSS)}
    )
    if not layers:
        return
    place = {(point.array, point.layer): point for point in standard}
    for site in ALGEBRA if summed else ALGEBRA[:2]:
        for point in find_hook_points(model, Site(site), layers if site in ALGEBRA[:2] else summed):
            place.setdefault((site, point.layer), point)
    for layer in summed:
        with suppress(SiteError):  # most blocks have no cross-attention
            place.setdefault((CROSS, layer), find_hook_points(model, Site(CROSS), layer)[0])
    norms = _norm_points(model, summed)
    asked = [*place.values(), *(point for ends in norms.values() for point in ends)]
    values = reader(model, tuple(dict.fromkeys(asked)), example).values
    read = {point: value.to(torch.promote_types(value.dtype, torch.float32)) for point, value in values.items()}
    epsilons = [torch.finfo(value.dtype).eps for value in values.values()]
    for layer in layers:
        post, following = place["resid_post", layer], place.get(("resid_pre", layer + 1))
        if following is not None and not _same(read[post], read[following]):
            raise _broken_stream(layer, post, following)
    for layer in summed:
        pre, post, attn, mlp = (place[site, layer] for site in ALGEBRA)
        parts = _BlockPoints(pre, post, attn, mlp, place.get((CROSS, layer)))
        _check_shapes(parts, read)
        for sum_ in _sums(parts, norms.get(layer), read, max(epsilons)):
            _check(sum_, layer, model.training)


class _BlockPoints(NamedTuple):
    pre: HookPoint
    post: HookPoint
    attn: HookPoint
    mlp: HookPoint
    cross: HookPoint | None

    @property
    def added(self) -> tuple[HookPoint, ...]:
        """The points whose values a block adds, in order."""
        return (self.attn, self.mlp) if self.cross is None else (self.attn, self.cross, self.mlp)


@dataclass(frozen=True)
class _ResidualSum:
    """Terms that must add up to *total*, to rounding; *added* are the points of the terms after the first."""

    total: torch.Tensor
    terms: tuple[torch.Tensor, ...]
    added: tuple[HookPoint, ...]
    eps: float

    def deviation(self, without: int | None = None) -> tuple[float, float]:
        """Return the largest difference, absolute and in units of its bound; NaN if a value is NaN."""
        kept = [term for number, term in enumerate(self.terms) if number != without]
        difference = (self.total - sum(kept[1:], kept[0])).abs()
        magnitude = torch.stack([term.abs() for term in self.terms]).sum(dim=0)
        ratio = torch.where(difference == 0, 0.0, difference / (ROUNDINGS * self.eps * magnitude))
        return difference.max().item(), ratio.max().item()


def _sums(
    parts: _BlockPoints, norms: tuple[HookPoint, ...] | None, read: dict[HookPoint, torch.Tensor], eps: float
) -> tuple[_ResidualSum, ...]:
    """Return the block's one sum, or the sums that its norms read if that fails and the block normalizes last."""
    post, added = read[parts.post], parts.added
    whole = _ResidualSum(post, (read[parts.pre], *(read[point] for point in added)), added, eps)
    if norms is None or whole.deviation()[1] <= 1:
        return (whole,)
    given, made = [read[point] for point in norms[::2]], [read[point] for point in norms[1::2]]
    if not torch.equal(made[-1], post):
        return (whole,)
    streams = (read[parts.pre], *made)
    return tuple(
        _ResidualSum(total, (stream, read[point]), (point,), eps)
        for total, stream, point in zip(given, streams, added, strict=False)
    )


def _check(sum_: _ResidualSum, layer: int, training: bool) -> None:
    sites = " and ".join(point.array for point in sum_.added)
    where = ", ".join(point.module for point in sum_.added)
    difference, ratio = sum_.deviation()
    if not ratio <= 1:
        raise SiteError(
            f"{sites} of layer {layer}: the block adds something else to the residual stream",
            where=where,
            expected=f"resid_post = resid_pre + {' + '.join(point.array for point in sum_.added)}, to rounding",
            found=f"a deviation of up to {difference:.3g}, {ratio:.3g} times the bound",
            remedy=("call model.eval() first, since dropout may be on; or " if training else "")
            + "the model scales or norms what it adds, or adds more than these: give a module path as site instead,"
            f" such as {where.partition(',')[0]}",
        )
    for number, point in enumerate(sum_.added, start=1):
        if sum_.terms[number].any() and not sum_.deviation(without=number)[1] > 1:
            raise SiteError(
                f"{point.array} of layer {layer} is too small to be checked against the residual stream",
                where=point.module,
                expected=f"some element of more than {ROUNDINGS} · eps = {ROUNDINGS * sum_.eps:.2g} of the terms' sum",
                remedy=f"compute in float32, or give the module path {point.module} as site instead",
            )


def _check_shapes(parts: _BlockPoints, read: dict[HookPoint, torch.Tensor]) -> None:
    expected = tuple(read[parts.pre].shape)
    for point in (parts.pre, parts.post, *parts.added):
        if tuple(read[point].shape) != expected:
            raise SiteError(
                f"{point} is not part of the residual stream",
                expected=f"shape {expected}, as of {parts.pre}",
                found=str(tuple(read[point].shape)),
                remedy=f"give the module path {point.module} as site instead",
            )


def _norm_points(model: nn.Module, layers: list[int]) -> dict[int, tuple[HookPoint, ...]]:
    """Return, for blocks that may normalize last, the input and output of each norm after a sum."""
    path, blocks = find_blocks(model)
    found: dict[int, tuple[HookPoint, ...]] = {}
    crossed = is_encoder_decoder(model)
    here = next((block for block in blocks if not is_remote_block(block)), blocks[0])
    for layer in layers:
        block = here if is_remote_block(blocks[layer]) else blocks[layer]
        for pair in NORM_PAIRS:
            if all(find_submodule(block, name) is not None for name in pair):
                between = CROSS_NORMS.get(pair[0]) if crossed else None
                names = [
                    pair[0],
                    *([between] if between and find_submodule(block, between) is not None else []),
                    pair[1],
                ]
                sides: tuple[Side, Side] = ("input", "output")
                found[layer] = tuple(HookPoint("norm", layer, f"{path}.{layer}.{n}", s) for n in names for s in sides)
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if two activations are equal, NaN included: the recorder reports values that are not finite."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _broken_stream(layer: int, post: HookPoint, following: HookPoint) -> SiteError:
    return SiteError(
        f"resid_post of layer {layer} is not resid_pre of layer {layer + 1}",
        where=f"{post.module} and {following.module}",
        expected="the output of a block to be the input of the next, bit for bit",
        remedy="give module paths instead of standard sites: the model changes the stream between its blocks",
    )
