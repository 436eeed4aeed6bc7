"""Proves, on a small batch, that sites inside a block are what their names promise, by their algebra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.aliases import ATTENTION_SCALE, NORM_PAIRS, part
from flexcache.hooks.blocks import find_blocks, is_elsewhere
from flexcache.hooks.locate import locate
from flexcache.hooks.measure import Example, Reader, read_example
from flexcache.hooks.names import modules
from flexcache.hooks.slots import Slots
from flexcache.hooks.tap import Tap
from flexcache.site import Site

PARTS = ("resid_mid", "mlp_pre", "z", "router_logits", "final_norm")
ROUNDINGS = 4
"""The bound, in units of eps · (sum of magnitudes), as of `check_identity`."""
GATED = (("up_proj", None), ("w3", None), ("gate_up_proj", 1), ("Wi", 1), ("wi_1", None))
"""What a gated MLP multiplies its activated gate by: a module of its own, or a half of one."""

Values = dict[Tap, torch.Tensor]


def check_parts(
    model: nn.Module, taps: Sequence[Tap], *, example: Example | None = None, reader: Reader = read_example
) -> None:
    """Check those sites among *taps* that are inside a block, and the last norm, by one forward of a small batch.

    ``resid_mid`` = ``resid_pre`` + ``attn_out``, or the norm of that where the block normalizes last; ``mlp_post`` is
    the non-linearity of ``mlp_pre``, times the other half of a gated MLP; what the projection that reads ``z`` gives is
    ``attn_out``, before a post-norm; ``router_logits`` are the router's weights times its input; the last norm reads
    the last ``resid_post``.

    Raises
    ------
    SiteError
        With the site, the layer, and the size of the misfit.
    """
    checks = [check for tap in taps if tap.array in PARTS for check in _checks(model, tap)]
    wanted = dict.fromkeys(tap for check in checks for tap in check.taps)
    if not wanted:
        return
    read = reader(model, tuple(wanted), example).values
    for check in checks:
        check.run({tap: value.to(torch.promote_types(value.dtype, torch.float32)) for tap, value in read.items()}, read)


class _Check:
    """That the values at one tap are what others say, to rounding, by any of *ways*."""

    def __init__(self, tap: Tap, law: str, ways: Sequence[tuple[str, tuple[Tap, ...]]]) -> None:
        self.tap, self.law, self.ways = tap, law, ways

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (self.tap, *(tap for _, taps in self.ways for tap in taps))

    def run(self, wide: Values, stored: Values) -> None:
        target = wide[self.tap]
        eps = max(torch.finfo(stored[tap].dtype).eps for tap in self.taps)
        misfits = []
        for how, taps in self.ways:
            terms = [wide[tap].flatten(2) for tap in taps]
            if any(term.shape != target.flatten(2).shape for term in terms):
                continue
            misfits.append(_misfit(target.flatten(2), terms, how, eps))
        if not min(misfits, default=float("inf")) <= 1:
            layer = "" if self.tap.layer is None else f" of layer {self.tap.layer}"
            raise SiteError(
                f"{self.tap.array}{layer} is not what its name promises",
                where=str(self.tap),
                expected=f"{self.law}, to rounding",
                found=f"a misfit of {min(misfits):.3g} times the bound" if misfits else "nothing of the same shape",
                remedy=f"give the module path {self.tap.module} as site instead, or choose another site",
            )


def _misfit(target: torch.Tensor, terms: list[torch.Tensor], how: str, eps: float) -> float:
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


def _checks(model: nn.Module, tap: Tap) -> Iterator[_Check]:
    tap = replace(tap, gradient=False, array=tap.array.removesuffix(".grad"))
    if tap.array == "final_norm":
        last = locate(model, Site("resid_post"), -1)[0]
        yield _Check(replace(tap, side="input"), "what the last block gives", [("sum", (last,))])
        return
    if tap.layer is None:
        return
    path, blocks = find_blocks(model)
    here = next((block for block in blocks if not is_elsewhere(block)), blocks[0])
    block = here if is_elsewhere(blocks[tap.layer]) else blocks[tap.layer]
    prefix = f"{path}.{tap.layer}"

    def at(site: str) -> Tap:
        return locate(model, Site(site), tap.layer or 0)[0]

    if tap.array == "resid_mid":
        norms = [first for first, last in NORM_PAIRS if tap.module == f"{prefix}.{first}" and part(block, last)]
        if norms and tap.side == "output":
            first = replace(tap, side="input")
            yield _Check(first, "the norm of resid_pre + attn_out", [("sum", (at("resid_pre"), at("attn_out")))])
        else:
            yield _Check(tap, "resid_pre + attn_out", [("sum", (at("resid_pre"), at("attn_out")))])
    elif tap.array == "mlp_pre":
        activated = replace(tap, side="output")
        factors = _gates(block, prefix, tap)
        law = "mlp_post = the non-linearity of mlp_pre, or that times what its gated MLP multiplies it by"
        with suppress(SiteError):
            post = at("mlp_post")
            ways = [("product", (activated,)), *(("product", (activated, other)) for other in factors)]
            yield _Check(post, law, ways)
            return
        raise SiteError(
            f"mlp_pre of layer {tap.layer} cannot be checked", where=str(tap), expected="a down-projection beside it"
        )
    elif tap.array == "z":
        projected, added = replace(tap, side="output"), at("attn_out")
        before = replace(added, side="input")  # of a post-norm
        name = added.module.rpartition(".")[2]
        ways = [("sum", (added,)), *([("sum", (before,))] if "norm" in name or name == ATTENTION_SCALE else [])]
        if added != replace(projected, array="attn_out"):
            yield _Check(projected, "attn_out, or what its post-norm or layer scale reads", ways)
    elif tap.array == "router_logits":
        yield _Router(tap, modules(model)[tap.module])


def _gates(block: nn.Module, prefix: str, tap: Tap) -> list[Tap]:
    """Return what the activated gate may be multiplied by."""
    mlp = tap.module.removeprefix(f"{prefix}.").rpartition(".")[0]
    found = []
    for name, half in GATED:
        module = part(block, f"{mlp}.{name}" if mlp else name)
        width = None if module is None else getattr(module, "out_features", None)
        if width is not None:
            slots = None if half is None else Slots(1, 2, half, half + 1, width // 2)
            found.append(Tap("gate", tap.layer, f"{prefix}.{mlp}.{name}", "output", slots=slots))
    return found


class _Router(_Check):
    """That a router gives its weights times its input; nothing where the weights are not whole on this process."""

    def __init__(self, tap: Tap, module: nn.Module) -> None:
        super().__init__(tap, "the router's weights times what it reads", [("", (replace(tap, side="input"),))])
        self.module = module

    def run(self, wide: Values, stored: Values) -> None:
        logits, given = wide[self.tap].float(), wide[replace(self.tap, side="input")].float()
        weight, bias = getattr(self.module, "weight", None), getattr(self.module, "bias", None)
        if isinstance(weight, nn.Parameter) and type(weight.data) is not torch.Tensor:
            return  # sharded: only all ranks together have it
        raw = False
        if isinstance(weight, nn.Parameter) and weight.shape == (logits.shape[-1], given.shape[-1]):
            with torch.no_grad():
                made = nn.functional.linear(given, weight.float(), None if bias is None else bias.float())
            eps = ROUNDINGS * torch.finfo(stored[self.tap].dtype).eps
            raw = torch.allclose(logits, made, rtol=eps, atol=eps * float(made.abs().max()))
        if not raw:
            raise SiteError(
                f"router_logits of layer {self.tap.layer} are not what their name promises",
                where=str(self.tap),
                expected=self.law,
                found="something made of it, such as probabilities",
                remedy=f"give the module path {self.tap.module} as site instead",
            )
