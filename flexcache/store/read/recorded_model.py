"""Return the record of the model that filled a store, including units of other models."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexcache.store.format.model_record import OTHERS, comparable_record, other_models
from flexcache.store.format.provenance import Provenance

LOOKED_AT = 4096
"""Maximum number of ledger records to read; in a larger store, they are evenly spaced."""


def recorded_model(store: Any) -> dict[str, Any]:
    """Return the record of the model that filled a store, for `flexcache.identity.differences`.

    If some units were computed by another model, which a capture allows only on request, the record contains their
    marks, and differs from the record of any single model.
    """
    found = comparable_record(getattr(store, "provenance", Provenance()).model_record)
    ledger, units = getattr(store, "ledger", None), getattr(store, "committed_units", ())
    if ledger is None or not len(units):
        return found
    chosen = np.unique(np.linspace(0, len(units) - 1, min(len(units), LOOKED_AT)).astype(np.int64))
    marks = other_models(ledger.read_record(int(units[at])).fingerprint for at in chosen)
    return {**found, OTHERS: marks} if marks else found
