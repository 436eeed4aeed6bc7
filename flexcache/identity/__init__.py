"""Identity of a model: digests of its values, its structure by name, and its outputs on a small fixed input."""

from flexcache.store.format.model_comparison import check_model, differences
from flexcache.store.format.model_record import (
    comparable_record,
    get_identity,
    has_weight_digests,
    model_key,
    other_models,
    stored_record,
)

__all__ = [
    "check_model",
    "comparable_record",
    "differences",
    "get_identity",
    "has_weight_digests",
    "model_key",
    "other_models",
    "stored_record",
]
