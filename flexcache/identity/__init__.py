"""Identity of a model: digests of its values, its structure by name, and its outputs on a small fixed input."""

from flexcache.identity.record import (
    check_model,
    comparable,
    differences,
    for_store,
    identity_of,
    known,
    model_key,
    model_record,
    other_models,
)

__all__ = [
    "check_model",
    "comparable",
    "differences",
    "for_store",
    "identity_of",
    "known",
    "model_key",
    "model_record",
    "other_models",
]
