"""Number of heads at the sites of attention: queries, keys, values, and results."""

from __future__ import annotations

from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.attention import find_heads
from flexcache.hooks.locate.names import modules_by_path
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.site import Site

HEAD_SITES = ("q", "k", "v", "z")


def count_heads(model: nn.Module, site: str, layer: int) -> int:
    """Return the number of heads at *site* in a layer: of queries for ``q`` and ``z``, of keys for ``k`` and ``v``.

    Raises
    ------
    SiteError
        The site has no heads, or their number is not known.
    """
    if site not in HEAD_SITES:
        raise SiteError(f"site {site} has no heads", expected=f"one of {', '.join(HEAD_SITES)}")
    named, place = modules_by_path(model), find_hook_points(model, Site(site), layer)[0]
    try:
        attention = named[find_hook_points(model, Site("q"), layer)[0].module.rpartition(".")[0]]
    except SiteError:  # latent or linear attention, without one projection of queries
        attention = named[place.module.rpartition(".")[0]]
        own = next((n for n in ("num_v_heads", "num_heads") if isinstance(getattr(attention, n, None), int)), None)
        heads = None if own is None else int(getattr(attention, own))
    else:
        found = find_heads(attention)
        heads = None if found is None else found.queries if site in ("q", "z") else found.keys
    if heads is None:
        raise SiteError(
            "the number of heads is not known",
            where=str(place),
            expected="num_heads of the attention or its configuration",
            found=type(attention).__name__,
        )
    return heads
