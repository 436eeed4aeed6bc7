"""The table of families and sites in docs/sites.md, generated from the models of the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from flexcache.errors import SiteError
from flexcache.hooks import HookPoint, check_sites, find_blocks, find_hook_points
from flexcache.site import ONCE, STANDARD, Site
from tests.models import FAMILIES, MIXTURES, TWO_SIDED, tiny
from tests.vision import VISION, tiny_vision

PAGE = Path(__file__).parents[2] / "docs" / "sites.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
SITES = (*STANDARD, *ONCE)
BEGIN_VISION, END_VISION = "<!-- vision -->\n", "<!-- end of vision -->\n"
CROSS = "cross_attn_out"
BEGIN_MIXTURES, END_MIXTURES = "<!-- mixtures -->\n", "<!-- end of mixtures -->\n"
OF_EXPERTS = ("router_logits", "expert_out", "expert_index", "expert_weight", "mlp_post")
UNCHECKED = ("mlp_post", "embed")
REASONS = {
    "granite": "`attn_out`, `mlp_out`, `resid_mid`: the model scales these terms before it adds them, and no module"
    " returns the scaled ones",
    "albert": "no site in a block: all layers run one shared block",
    "jamba": "`mlp_out` for all layers: layers with a state space have no `attn_out` for the check",
}
MIXTURE_REASONS = {
    "cohere2_moe": "the MLP averages the sums of routed and of shared experts",
    "axk1": "the MLP norms the sum of routed and shared experts",
    "llama4": "its experts all read every token, scaled by the router, and its router returns scores after a sigmoid",
    "jetmoe": "its experts read sorted rows, and its router returns their order",
}
VISION_REASONS = {
    "beit, data2vec_vision": "`attn_out`, `mlp_out`, `resid_mid`: each block scales these terms by its own parameters"
    " before it adds them, and no module returns the scaled ones",
    "clip_vision": "the last norm reads only the class token, so there is no `final_norm` for every token",
}


def cell(model: torch.nn.Module, site: str) -> tuple[str, list[HookPoint]]:
    """Return what there is to say of a site of a model before it is checked, and its points."""
    if site in ONCE:
        try:
            return "✓", list(find_hook_points(model, Site(site)))
        except SiteError:
            return "", []
    try:
        depth = len(find_blocks(model)[1])
    except SiteError:
        return "", []
    points: list[HookPoint] = []
    for layer in range(depth):
        with suppress(SiteError):
            points += find_hook_points(model, Site(site), layer)
    return ("✓" if len(points) == depth else "some" if points else ""), points


def holds(model: torch.nn.Module, points: Sequence[HookPoint]) -> bool:
    try:
        check_sites(model, points)
    except SiteError:
        return False
    return True


def line(family: str, kind: str, model: torch.nn.Module, sites: Sequence[str]) -> str:
    """Return a family's line of the table; all its sites are checked together, and one by one where that fails."""
    found = {site: cell(model, site) for site in sites}
    together = holds(model, [point for _, points in found.values() for point in points])
    said = []
    for site, (text, points) in found.items():
        right = together or not points or holds(model, points)
        checked = site not in UNCHECKED or any(point.of_experts for point in points)
        said.append(("found" if text == "✓" and not checked else text) if right else "refused")
    return f"| {family} | {kind} | {' | '.join(said)} |"


def table(
    families: Mapping[str, tuple[str, object]],
    make: Callable[[str], torch.nn.Module],
    reasons: Mapping[str, str],
    sites: Sequence[str] = tuple(site for site in SITES if site not in (CROSS, *OF_EXPERTS[1:4])),
) -> str:
    """Return the table of some families and, below it, the reasons for what is refused."""
    head = f"| family | class | {' | '.join(f'`{site}`' for site in sites)} |"
    lines = [head, "|" + "---|" * (len(sites) + 2)]
    lines += [line(family, kind, make(family), sites) for family, (kind, _) in families.items()]
    return "\n".join([*lines, "", *(f"- {family}: {reason}." for family, reason in reasons.items())]) + "\n"


def with_table(page: str) -> str:
    """Return the page with the table of text models as it is now."""
    before, _, rest = page.partition(BEGIN)
    sided = table(TWO_SIDED, tiny, {}, tuple(site for site in SITES if site not in OF_EXPERTS[1:4])).rstrip()
    made = f"{table(FAMILIES, tiny, REASONS)}\nDecoders with an encoder:\n\n{sided}\n"
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def with_mixtures(page: str) -> str:
    """Return the page with the table of mixtures of experts as it is now."""
    before, _, rest = page.partition(BEGIN_MIXTURES)
    made = table(MIXTURES, tiny, MIXTURE_REASONS, OF_EXPERTS)
    return f"{before}{BEGIN_MIXTURES}\n{made}\n{END_MIXTURES}{rest.partition(END_MIXTURES)[2]}"


def with_vision(page: str) -> str:
    """Return the page with the table of vision transformers as it is now."""
    before, _, rest = page.partition(BEGIN_VISION)
    made = table(VISION, tiny_vision, VISION_REASONS)
    return f"{before}{BEGIN_VISION}\n{made}\n{END_VISION}{rest.partition(END_VISION)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_vision(with_mixtures(with_table(PAGE.read_text(encoding="utf-8")))), encoding="utf-8")
