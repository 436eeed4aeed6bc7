"""Whether a store holds what a replay needs, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexcache.identity import known, model_record

if TYPE_CHECKING:
    from flexcache.store.read.store import Store

RESIDUAL = ("resid_post", "resid_pre")


@dataclass(frozen=True)
class Replayable:
    """True where nothing of a store stands in the way of replaying it.

    Attributes
    ----------
    reasons : mapping from str to str
        By a short name, which `analysis.replay` takes in its ``accept``: what stands in the way.
    """

    reasons: dict[str, str]

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return "; ".join(self.reasons.values()) or "nothing stands in the way of a replay"


def replayable(store: Store) -> Replayable:
    """Return what of a store stands in the way of running the rest of its model on its rows.

    Whether a model at hand is the one that filled it, see `analysis.replay.engine.compatibility`.
    """
    reasons = {}
    if store.spec.get("rows") != "all":
        reasons["rows"] = f"rows are the {store.spec.get('rows')} of each document, and a forward needs every token"
    elif store.spec.get("windows") is not None and len(store.tokens) and _cut(store):
        reasons["rows"] = "long documents were run in windows, and the rows of what windows share are of one alone"
    elif store.spec.get("packing") is not None:
        reasons["rows"] = "documents were packed into sequences, and a replay runs each by itself"
    if not any(store.arrays[site].layers for site in RESIDUAL if site in store.arrays):
        reasons["site"] = f"no residual stream is stored: there are {', '.join(store.sites)}"
    coarse = [site for site in RESIDUAL if site in store.arrays and store.arrays[site].dtype == "int8"]
    if coarse:
        reasons["int8"] = f"{' and '.join(coarse)} is stored as int8, and its rows are not those of the model"
    if not len(store.committed_units):
        reasons["units"] = "no unit is committed"
    if not known(model_record(store.provenance)):
        reasons["weights"] = "nothing tells which weights filled it"
    return Replayable(reasons)


def _cut(store: Store) -> bool:
    """Whether a document was cut into several windows."""
    return int(np.max(store.tokens.column("start").to_numpy())) > 0
