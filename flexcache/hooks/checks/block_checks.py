"""Checks of sites inside a block, by their algebra on a small batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.aliases import ATTENTION_SCALE, NORM_PAIRS, find_submodule
from flexcache.hooks.locate.blocks import find_blocks, is_remote_block
from flexcache.hooks.locate.fused_projection import FusedProjectionSlice
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import modules_by_path
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.hooks.read.measure import Example, ExampleReader, read_example
from flexcache.site import Site

BLOCK_SITES = ("resid_mid", "mlp_pre", "z", "router_logits", "final_norm")
ROUNDINGS = 4
"""The bound, in units of eps · (sum of magnitudes); see `check_sites`."""
GATED = (("up_proj", None), ("w3", None), ("gate_up_proj", 1), ("Wi", 1), ("wi_1", None))
"""Factors of the activated gate in a gated MLP: a separate module, or one half of a fused one."""

Values = dict[HookPoint, torch.Tensor]


def check_block_sites(
    model: nn.Module,
    points: Sequence[HookPoint],
    *,
    example: Example | None = None,
    reader: ExampleReader = read_example,
) -> None:
    """Check the sites inside a block among *points*, and the last norm, by one forward of a small batch.

    - ``resid_mid`` is ``resid_pre`` + ``attn_out``, or the norm of this sum if the block normalizes last.
    - ``mlp_post`` is the non-linearity of ``mlp_pre``, times the other half in a gated MLP.
    - The projection that reads ``z`` returns ``attn_out``, before a post-norm.
    - ``router_logits`` are the router's weights times its input.
    - The last norm reads the last ``resid_post``.

    Raises
    ------
    SiteError
        A site is not what its name says. The error gives the site, the layer and the size of the deviation.
    """
    checks = [check for point in points if point.array in BLOCK_SITES for check in _checks(model, point)]
    wanted = dict.fromkeys(point for check in checks for point in check.points)
    if not wanted:
        return
    read = reader(model, tuple(wanted), example).values
    for check in checks:
        check.run(
            {point: value.to(torch.promote_types(value.dtype, torch.float32)) for point, value in read.items()}, read
        )


class _ValueCheck:
    """Check that the values at a point equal a sum or product of others, to rounding, in any of *ways*."""

    def __init__(self, point: HookPoint, law: str, ways: Sequence[tuple[str, tuple[HookPoint, ...]]]) -> None:
        self.point, self.law, self.ways = point, law, ways

    @property
    def points(self) -> tuple[HookPoint, ...]:
        return (self.point, *(point for _, points in self.ways for point in points))

    def run(self, wide: Values, stored: Values) -> None:
        target = wide[self.point]
        eps = max(torch.finfo(stored[point].dtype).eps for point in self.points)
        errors = []
        for how, points in self.ways:
            terms = [wide[point].flatten(2) for point in points]
            if any(term.shape != target.flatten(2).shape for term in terms):
                continue
            errors.append(_relative_error(target.flatten(2), terms, how, eps))
        if not min(errors, default=float("inf")) <= 1:
            layer = "" if self.point.layer is None else f" of layer {self.point.layer}"
            raise SiteError(
                f"{self.point.array}{layer} is not what its name says",
                where=str(self.point),
                expected=f"{self.law}, to rounding",
                found=f"a deviation of {min(errors):.3g} times the bound" if errors else "no value of the same shape",
                remedy=f"give the module path {self.point.module} as site instead, or choose another site",
            )


def _relative_error(target: torch.Tensor, terms: list[torch.Tensor], how: str, eps: float) -> float:
    """Return the largest difference of *target* from the terms' sum or product, in units of its bound."""
    if how == "product":
        made = terms[0].clone()
        for term in terms[1:]:
            made = made * term
        magnitude = made.abs()
    else:
        made = sum(terms[1:], terms[0])
        magnitude = torch.stack([term.abs() for term in terms]).sum(dim=0)
    difference = (target - made).abs()
    return float(torch.where(difference == 0, 0.0, difference / (ROUNDINGS * eps * magnitude)).max())


def _checks(model: nn.Module, point: HookPoint) -> Iterator[_ValueCheck]:
    point = replace(point, gradient=False, array=point.array.removesuffix(".grad"))
    if point.array == "final_norm":
        last = find_hook_points(model, Site("resid_post"), -1)[0]
        yield _ValueCheck(replace(point, side="input"), "the output of the last block", [("sum", (last,))])
        return
    if point.layer is None:
        return
    path, blocks = find_blocks(model)
    here = next((block for block in blocks if not is_remote_block(block)), blocks[0])
    block = here if is_remote_block(blocks[point.layer]) else blocks[point.layer]
    prefix = f"{path}.{point.layer}"

    def at(site: str) -> HookPoint:
        return find_hook_points(model, Site(site), point.layer or 0)[0]

    if point.array == "resid_mid":
        norms = [
            first for first, last in NORM_PAIRS if point.module == f"{prefix}.{first}" and find_submodule(block, last)
        ]
        if norms and point.side == "output":
            first = replace(point, side="input")
            yield _ValueCheck(first, "the norm of resid_pre + attn_out", [("sum", (at("resid_pre"), at("attn_out")))])
        else:
            yield _ValueCheck(point, "resid_pre + attn_out", [("sum", (at("resid_pre"), at("attn_out")))])
    elif point.array == "mlp_pre":
        activated = replace(point, side="output")
        factors = _gates(block, prefix, point)
        law = "mlp_post = the non-linearity of mlp_pre, times the other half in a gated MLP"
        with suppress(SiteError):
            post = at("mlp_post")
            ways = [("product", (activated,)), *(("product", (activated, other)) for other in factors)]
            yield _ValueCheck(post, law, ways)
            return
        raise SiteError(
            f"mlp_pre of layer {point.layer} cannot be checked",
            where=str(point),
            expected="a down-projection in the same MLP",
        )
    elif point.array == "z":
        projected, added = replace(point, side="output"), at("attn_out")
        before = replace(added, side="input")  # of a post-norm
        name = added.module.rpartition(".")[2]
        ways = [("sum", (added,)), *([("sum", (before,))] if "norm" in name or name == ATTENTION_SCALE else [])]
        if added != replace(projected, array="attn_out"):
            yield _ValueCheck(projected, "attn_out, or the input of its post-norm or layer scale", ways)
    elif point.array == "router_logits":
        yield _RouterCheck(point, modules_by_path(model)[point.module])


def _gates(block: nn.Module, prefix: str, point: HookPoint) -> list[HookPoint]:
    """Return the possible factors of the activated gate."""
    mlp = point.module.removeprefix(f"{prefix}.").rpartition(".")[0]
    found = []
    for name, half in GATED:
        module = find_submodule(block, f"{mlp}.{name}" if mlp else name)
        width = None if module is None else getattr(module, "out_features", None)
        if width is not None:
            fused = None if half is None else FusedProjectionSlice(1, 2, half, half + 1, width // 2)
            found.append(HookPoint("gate", point.layer, f"{prefix}.{mlp}.{name}", "output", fused_slice=fused))
    return found


class _RouterCheck(_ValueCheck):
    """Check that a router returns its weights times its input; skipped if this process does not hold all weights."""

    def __init__(self, point: HookPoint, module: nn.Module) -> None:
        super().__init__(point, "the router's weights times its input", [("", (replace(point, side="input"),))])
        linear = [child for child in module.children() if isinstance(child, nn.Linear)]
        self.module = module if hasattr(module, "weight") or len(linear) != 1 else linear[0]

    def run(self, wide: Values, stored: Values) -> None:
        logits, given = wide[self.point].float(), wide[replace(self.point, side="input")].float()
        weight, bias = getattr(self.module, "weight", None), getattr(self.module, "bias", None)
        if isinstance(weight, nn.Parameter) and type(weight.data) is not torch.Tensor:
            return  # sharded: no single rank has all of it
        raw = False
        if isinstance(weight, nn.Parameter) and weight.shape == (logits.shape[-1], given.shape[-1]):
            with torch.no_grad():
                made = nn.functional.linear(given, weight.float(), None if bias is None else bias.float())
            eps = ROUNDINGS * torch.finfo(stored[self.point].dtype).eps
            raw = torch.allclose(logits, made, rtol=eps, atol=eps * float(made.abs().max()))
        if not raw:
            raise SiteError(
                f"router_logits of layer {self.point.layer} are not what their name says",
                where=str(self.point),
                expected=self.law,
                found="values computed from them, such as probabilities",
                remedy=f"give the module path {self.point.module} as site instead",
            )
