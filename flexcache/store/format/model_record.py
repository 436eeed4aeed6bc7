"""The record of a model in a store; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xxhash

Record = Mapping[str, Any]
IDENTITY, CONFIG, NAMES, ADAPTERS = "identity", "config", "names", "adapters"
SAMPLE, CONFIG_DIGEST = "weights_sample_xxh3_128", "config_xxh3_128"
APART = ("name", "revision", "files", ADAPTERS, IDENTITY, SAMPLE, CONFIG_DIGEST)
"""Keys of a record that state where a model came from, or that are not compared for equality only."""
OTHERS = "other_models"
"""Marks of other models in the record of a store, which computed some of its units."""


def stored_record(model: Record) -> dict[str, Any]:
    """Return the record of a live model as a store keeps it: without the names of its tensors.

    >>> stored_record({"class": "Linear", "identity": {"weights": "a1", "names": ["weight"]}})
    {'class': 'Linear', 'identity': {'weights': 'a1'}}
    """
    identity = model.get(IDENTITY)
    if not isinstance(identity, Mapping):
        return dict(model)
    return {**model, IDENTITY: {key: value for key, value in identity.items() if key != NAMES}}


def comparable_record(model: Record) -> dict[str, Any]:
    """Return the part of a record by which models are compared, without that on where the model came from.

    >>> comparable_record({"name": "my/model", "class": "Linear"})
    {'class': 'Linear'}
    """
    return {
        key: value
        for key, value in stored_record(model).items()
        if key in ("class", ADAPTERS, CONFIG_DIGEST, SAMPLE, IDENTITY)
    }


def other_models(fingerprints: Iterable[Record]) -> list[str]:
    """Return the marks of units that were computed by another model than that of their store, with permission.

    >>> other_models([{"model": "1f2e"}, {"torch": "2.9"}])
    ['1f2e']
    """

    def marks(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            mark = value.get("model")
            yield from [mark] if isinstance(mark, str) else []
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from marks(part)

    return sorted({mark for fingerprint in fingerprints for mark in marks(fingerprint)})


def has_weight_digests(model: Record) -> bool:
    """Return True if a record states the weights of a model.

    >>> has_weight_digests({"class": "Linear"})
    False
    """
    return bool(model.get(SAMPLE) or model.get(IDENTITY))


def model_key(model: Record) -> str:
    """Return a short digest of a model's identity, for the ledger.

    >>> len(model_key({"class": "Linear"}))
    16
    """
    identity = model.get(IDENTITY) or {}
    parts = [model.get("class"), model.get(CONFIG_DIGEST), model.get(SAMPLE), identity.get("weights")]
    parts += [identity.get("structure", {}).get("adapters"), (identity.get("behavior") or {}).get("bits")]
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())


def adapters_text(model: Record) -> str | None:
    """Return the adapters that a model was loaded with, as text; None if it has some of which nothing was recorded.

    >>> adapters_text({"adapters": [{"name": "french", "weight": 0.5, "merged": True, "files": {"a": "1f2e"}}]})
    'french (1f2e), weight 0.5, merged'
    """
    held = model.get(ADAPTERS)
    if held is None:
        structure = as_mapping(as_mapping(model.get(IDENTITY)).get("structure"))
        return None if structure.get("adapters") else ""
    lines = []
    for one in map(as_mapping, held if isinstance(held, list) else ()):
        marks = " ".join(str(mark)[:8] for mark in as_mapping(one.get("files")).values())
        text = f"{one.get('name')} ({marks}), weight {one.get('weight')}"
        lines.append(text + (", merged" if one.get("merged") else ""))
    return "; ".join(lines)


def get_identity(model: Record) -> Record | None:
    """Return the identity in a record, or None in records of earlier versions.

    >>> get_identity({"class": "Linear"}) is None
    True
    """
    held = as_mapping(model.get(IDENTITY))
    return held if isinstance(held.get("weights"), str) else None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return *value* if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def engine_text(model: Mapping[str, Any]) -> str:
    """Return name and version of the engine that computed the activations, from the record of a model; empty if none.

    >>> engine_text({"name": "gpt2", "engine": {"name": "vllm", "version": "0.22.0"}})
    'vllm 0.22.0'
    """
    engine = as_mapping(model.get("engine"))
    return " ".join(str(engine[key]) for key in ("name", "version") if engine.get(key))
