"""Check that a store holds all that a replay of its rows needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexcache.store.format.model_record import has_weight_digests
from flexcache.store.read.open_store import OpenStore

RESIDUAL = ("resid_post", "resid_pre")


@dataclass(frozen=True)
class Replayable:
    """Result of the check; true if a replay is possible.

    ::

        if not store.replayable:
            print(store.replayable.reasons)

    Attributes
    ----------
    reasons : mapping from str to str
        Obstacles by short names, which `analysis.replay` takes in its ``accept``.
    """

    reasons: dict[str, str]

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return "; ".join(self.reasons.values()) or "the store can be replayed"


def replayable(store: OpenStore) -> Replayable:
    """Return the obstacles to running the rest of a store's model on its rows.

    `analysis.replay.engine.compatibility` checks the model that is to run them.
    """
    reasons = {}
    if store.spec.rows != "all":
        reasons["rows"] = f"rows are the {store.spec.rows} of each document, and a forward needs every token"
    elif store.spec.windows is not None and len(store.tokens) and _has_windows(store):
        reasons["rows"] = "long documents were run in windows, and rows that windows share come from only one of them"
    elif store.spec.packing is not None:
        reasons["rows"] = "documents were packed into sequences, and a replay runs each document by itself"
    if not any(store.arrays[site].layers for site in RESIDUAL if site in store.arrays):
        reasons["site"] = f"no residual stream is stored: there are {', '.join(store.sites)}"
    coarse = [site for site in RESIDUAL if site in store.arrays and store.arrays[site].dtype == "int8"]
    if coarse:
        reasons["int8"] = f"{' and '.join(coarse)} is stored as int8, so its rows differ from those of the model"
    if not len(store.committed_units):
        reasons["units"] = "no unit is committed"
    if not has_weight_digests(store.provenance.model_record):
        reasons["weights"] = "the store does not record the weights that filled it"
    return Replayable(reasons)


def _has_windows(store: OpenStore) -> bool:
    """Return True if a document was cut into several windows."""
    return int(np.max(store.tokens.column("start").to_numpy())) > 0
