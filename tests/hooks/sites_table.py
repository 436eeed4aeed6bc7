"""The table of families and sites in docs/sites.md, made of the very models that the tests run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from flexcache.errors import SiteError
from flexcache.hooks import Tap, check_identity, find_blocks, locate
from flexcache.site import ONCE, STANDARD, Site
from tests.models import FAMILIES, tiny

PAGE = Path(__file__).parents[2] / "docs" / "sites.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
SITES = (*STANDARD, *ONCE)
UNCHECKED = ("mlp_post", "embed")
REASONS = {
    "granite": "`attn_out`, `mlp_out`, `resid_mid`: the model scales what it adds, and no module gives that",
    "albert": "no site in a block: one block is run for all layers",
    "t5": "two residual streams: pass `model.get_encoder()`, which is the line above",
    "jamba": "`mlp_out` for all layers: those of state space have no `attn_out` to be checked with",
}


def cell(model: torch.nn.Module, site: str) -> tuple[str, list[Tap]]:
    """Return what there is to say of a site of a model before it is checked, and its taps."""
    if site in ONCE:
        try:
            return "✓", list(locate(model, Site(site)))
        except SiteError:
            return "", []
    try:
        depth = len(find_blocks(model)[1])
    except SiteError:
        return "", []
    taps: list[Tap] = []
    for layer in range(depth):
        with suppress(SiteError):
            taps += locate(model, Site(site), layer)
    return ("✓" if len(taps) == depth else "some" if taps else ""), taps


def holds(model: torch.nn.Module, taps: Sequence[Tap]) -> bool:
    try:
        check_identity(model, taps)
    except SiteError:
        return False
    return True


def line(family: str) -> str:
    """Return a family's line of the table; all its sites are checked together, and one by one where that fails."""
    model = tiny(family)
    found = {site: cell(model, site) for site in SITES}
    together = holds(model, [tap for _, taps in found.values() for tap in taps])
    said = []
    for site, (text, taps) in found.items():
        right = together or not taps or holds(model, taps)
        said.append(("found" if text == "✓" else text) if right and site in UNCHECKED else text if right else "refused")
    return f"| {family} | {FAMILIES[family][0]} | {' | '.join(said)} |"


def table() -> str:
    """Return the table and, below it, the reasons for what is refused."""
    head = f"| family | class | {' | '.join(f'`{site}`' for site in SITES)} |"
    lines = [head, "|" + "---|" * (len(SITES) + 2), *(line(family) for family in FAMILIES), ""]
    return "\n".join([*lines, *(f"- {family}: {reason}." for family, reason in REASONS.items())]) + "\n"


def with_table(page: str) -> str:
    """Return the page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
