"""The receiver of a path: where the effect of an edit is allowed to arrive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from flexcache.errors import AnalysisError, nearest
from flexcache.site import READ_ONLY, STANDARD, resolve_layers
from flexcache.spec import is_whole

RANKS = {
    **dict.fromkeys(("resid_pre",), 0),
    **dict.fromkeys(("q", "k", "v", "z", "attn_out"), 1),
    **dict.fromkeys(("resid_mid",), 2),
    **dict.fromkeys(("cross_attn_out",), 3),
    **dict.fromkeys(("router_logits", "expert_index", "expert_weight", "expert_out"), 4),
    **dict.fromkeys(("mlp_pre", "mlp_post", "mlp_out"), 4),
    **dict.fromkeys(("resid_post",), 5),
}
"""Order of the sites in a block; each is reached by those of a lower rank, through the residual stream."""
WRITERS = ("attn_out", "cross_attn_out", "mlp_out")
"""Sites that are added to the residual stream."""


@dataclass(frozen=True)
class Receiver:
    """The end of a path: the only way by which the effect of an edit reaches the output.

    Path patching: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969.

    >>> Receiver("q", layer=9, heads=[3, 6], positions="last")
    Receiver(site='q', layer=9, heads=(3, 6), positions='last')

    Parameters
    ----------
    site, layer
        One of `flexcache.site.STANDARD` that can be edited, and its layer, negative from the end. ``resid_post`` of the
        last layer leads to the logits alone.
    heads
        Heads of ``q``, ``k``, ``v`` or ``z`` that receive; all by default.
    positions
        Tokens that receive: ``"all"``, ``"last"``, ``"first"``, a number, or positions by document id.
    """

    site: str
    layer: int
    heads: Any = None
    positions: Any = "all"

    def __post_init__(self) -> None:
        if self.site not in STANDARD or self.site in READ_ONLY:
            able = tuple(name for name in STANDARD if name not in READ_ONLY)
            raise AnalysisError(f"{self.site!r} cannot receive a path", remedy=nearest(str(self.site), able))
        if not is_whole(self.layer):
            raise AnalysisError("a receiver has one layer", expected="a whole number", found=repr(self.layer)[:80])
        if self.heads is not None:
            heads = (self.heads,) if is_whole(self.heads) else tuple(self.heads)
            if not heads or not all(is_whole(head) and head >= 0 for head in heads):
                raise AnalysisError("heads cannot be read", expected="whole numbers", found=repr(self.heads)[:80])
            object.__setattr__(self, "heads", heads)
        if isinstance(self.positions, Mapping):
            by_document = {str(name): tuple([at] if is_whole(at) else at) for name, at in self.positions.items()}
            object.__setattr__(self, "positions", by_document)
        elif self.positions not in ("all", "last", "first") and not is_whole(self.positions):
            raise AnalysisError(
                "positions of a receiver cannot be read",
                expected='"all", "last", "first", a whole number, or positions by document id',
                found=repr(self.positions)[:80],
            )

    def in_model(self, depth: int) -> Self:
        """Return the receiver with its layer counted from 0, in a model of *depth* blocks."""
        return replace(self, layer=resolve_layers(self.layer, depth)[0])

    def follows(self, site: str, layer: int) -> bool:
        """Return True if a path leads from a site and layer to the receiver.

        >>> Receiver("q", 9).follows("z", 8), Receiver("q", 9).follows("z", 9)
        (True, False)
        """
        return site_rank(site, layer) < site_rank(self.site, self.layer)

    def sites_between(self, site: str, layer: int) -> list[tuple[str, int]]:
        """Return the sites and layers that are added to the residual stream after a sender and before the receiver.

        >>> Receiver("q", 3).sites_between("z", 2)
        [('cross_attn_out', 2), ('mlp_out', 2)]
        """
        first, last = site_rank(site, layer), site_rank(self.site, self.layer)
        every = [(name, number) for number in range(self.layer + 1) for name in WRITERS]
        return [key for key in every if first < site_rank(*key) < last]


def site_rank(site: str, layer: int) -> int:
    """Return the place of a site in the order of a forward; a block's ``resid_post`` is the next one's ``resid_pre``.

    >>> site_rank("resid_post", 3) == site_rank("resid_pre", 4) < site_rank("z", 4) < site_rank("mlp_out", 4)
    True
    """
    return 5 * layer + RANKS[site]
