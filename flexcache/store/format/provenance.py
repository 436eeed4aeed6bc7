"""The provenance of a store: model, tokenizer, documents, software, and earlier stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import numpy as np

from flexcache.plan import Batching
from flexcache.store.format.model_record import OTHERS, as_mapping, comparable_record, other_models

Json = Mapping[str, Any]

LOOKED_AT = 4096
"""Maximum number of ledger records to read; in a larger store, they are evenly spaced."""


@dataclass(frozen=True)
class Provenance:
    """The model, tokenizer, documents and software that made a store; `Store.provenance` returns one.

    Attributes
    ----------
    model : mapping
        Name, revision, class, hashes of the files, and the digests by which models are compared.
    tokenizer : mapping or None
        Class and digests of the tokenizer, or of the image processor.
    documents : mapping
        Kind, files or count, and digest of the corpus.
    versions : mapping
        Versions of the software, by package.
    created : str
        Time in UTC, in ISO format; empty if it was not recorded.
    history : tuple of mapping
        One entry for each extension, copy, merge and removal.
    others : mapping
        Everything else: ``batching``, ``patches``, ``user_hooks``, ….

    ::

        store = flexcache.open("run.zarr")
        store.provenance.model_name             # 'Qwen/Qwen3-0.6B'
        store.provenance.created                # '2026-11-30T12:00:00+00:00'
    """

    model: Json = field(default_factory=dict)
    tokenizer: Json | None = None
    documents: Json = field(default_factory=dict)
    versions: Json = field(default_factory=dict)
    created: str = ""
    history: tuple[Json, ...] = ()
    others: Json = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Json) -> Provenance:
        """Return the provenance in the attributes of a store; an entry that an older store lacks is empty.

        Raises
        ------
        ValueError
            An entry has another type.
        """
        for name in ("model", "documents", "tokenizer"):
            if not isinstance(content.get(name), Mapping | None):
                raise ValueError(f"{name} is not a mapping")
        history = content.get("history")
        found = cls(
            model=content.get("model") or {},
            tokenizer=content.get("tokenizer"),
            documents=content.get("documents") or {},
            versions=as_mapping(content.get("versions")),
            created=str(content.get("created", "")),
            history=tuple(history) if isinstance(history, list) else (),
            others={name: value for name, value in content.items() if name not in _NAMED},
        )
        _ = found.batching
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the entries as plain values, as in the attributes of a store."""
        named = {name: getattr(self, name) for name in _NAMED}
        kept = {name: value for name, value in named.items() if value or name in ("model", "tokenizer", "documents")}
        return {**kept, **({"history": list(self.history)} if self.history else {}), **self.others}

    @property
    def model_name(self) -> str:
        """Name or path of the model; empty if it was not recorded."""
        return str(self.model.get("name", ""))

    @property
    def model_record(self) -> Json:
        """Record of the model whose activations the store holds, also if the store is shuffled."""
        return as_mapping(as_mapping(self.model.get("preshuffled")).get("model")) or self.model

    @property
    def batching(self) -> Batching | None:
        """Rule by which sequences share a batch, as found by forwards of the model; None if not recorded."""
        recorded = self.others.get("batching")
        if recorded is None:
            return None
        kinds: dict[str, Batching] = {str(kind): kind for kind in get_args(Batching)}
        if not isinstance(recorded, Mapping) or recorded.get("batches") not in kinds:
            raise ValueError(f"batching is {str(recorded)[:40]}")
        return kinds[recorded["batches"]]


_NAMED = tuple(one.name for one in fields(Provenance) if one.name != "others")


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
