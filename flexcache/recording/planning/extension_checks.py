"""Checks that an extension fits its store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexcache.documents import Documents
from flexcache.documents.digest import same_corpus
from flexcache.errors import ConfigError, MismatchError
from flexcache.identity import comparable_record
from flexcache.identity.tokenizer import CHAT_TEMPLATE, describe_tokenizer
from flexcache.provenance import select_fingerprint
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.objective import Objective, describe_objective
from flexcache.recording.planning.extension_request import (
    check_equal,
    tokens_of,
)
from flexcache.recording.planning.store_identity import check_same
from flexcache.spec import CaptureSpec
from flexcache.store.format.schema import read_attributes
from flexcache.store.read.store import Store

FIXED = (
    *("rows", "choice", "dtype", "max_length", "windows", "packing", "token_labels", "seed", "compression"),
    *("keep_text", "empty_documents"),
)
"""Fields of a `CaptureSpec` that an extension takes from its store."""


def check_source(store: Store, model: dict[str, Any], tokenizer: Any, allow_changed_model: bool = False) -> list[str]:
    """Return the differences between the model of a store and the given one, if they are allowed.

    Raises
    ------
    MismatchError
        The model or the tokenizer is not the one that the store was captured with.
    """
    stored = store.provenance
    chat = CHAT_TEMPLATE in (stored.tokenizer or {})
    return check_same(
        {"model": comparable_record(stored.model), "tokenizer": stored.tokenizer},
        {"model": model, "tokenizer": describe_tokenizer(tokenizer, chat)},
        store.path,
        allow_changed_model=allow_changed_model,
    )


def check_fixed(store: Store, spec: CaptureSpec) -> None:
    """Raise MismatchError if a spec sets a field that determines the rows of a store to another value."""
    CaptureSpec.from_store(read_attributes(store.path)["spec"])  # a field of a later version is an error
    given = {name for name in FIXED if name in spec.model_fields_set}
    asked, before = (one.model_dump(mode="json") for one in (spec, store.spec))
    different = [
        f"{name}: {before[name]} in the store, {asked[name]} in the configuration"
        for name in FIXED
        if name in given and asked[name] != before[name]
    ]
    inputs = spec.decoder_inputs if store.spec.decoder is None else store.spec.decoder.inputs
    if "decoder_inputs" in spec.model_fields_set and inputs != spec.decoder_inputs:
        different.append(f"decoder_inputs: {inputs} in the store, {spec.decoder_inputs} in the configuration")
    if different:
        raise MismatchError(
            "a store is extended with the options that it was begun with",
            where=str(store.path),
            found="\n    ".join(["", *different]),
            remedy="leave these keys out of the configuration, or make a new store",
        )


def _same_files(store: Store, corpus: Documents) -> bool:
    """Return True if a corpus consists of the files that the store was begun with."""
    description = corpus.describe()
    return bool(description["files"]) and same_corpus(store.provenance.documents, description)


def _enough(store: Store, corpus: Documents | None, max_tokens: int | None) -> str | None:
    """Return why no documents are added if the store has reached *max_tokens*, else None."""
    if corpus is None or max_tokens is None or (tokens := tokens_of(store)) < max_tokens:
        return None
    return f"{tokens:,} tokens of documents, and max_tokens is {max_tokens:,}"


def _check_objective(store: Store, targets: CaptureTargets, objective: Objective | None) -> None:
    """Raise MismatchError if the gradients would be those of another objective than in the store."""
    if targets.objective is not None:
        check_equal(
            store,
            "the objective",
            select_fingerprint(store.spec.objective),
            None if objective is None else select_fingerprint(describe_objective(objective)),
        )


def _check_known(store: Store, corpus: Documents | None) -> None:
    """Raise ConfigError if new sites are asked for together with another corpus than that of the store."""
    if corpus is not None and not same_corpus(store.provenance.documents, corpus.describe()):
        raise ConfigError(
            "documents and sites cannot be added together",
            where=str(store.path),
            expected=f"the corpus of the store, {_corpus(store.provenance.documents)}, or its sites",
            found=_corpus(corpus.describe()),
            remedy="add the sites first, on the existing documents, then the documents",
        )


def _corpus(description: Mapping[str, Any]) -> str:
    names = ", ".join(f"{file['name']} ({file['bytes']} bytes)" for file in description.get("files", [])[:4])
    return f"{description.get('kind')} {names or description.get('count')}"


def _check_whole(store: Store, given: dict[str, Any]) -> None:
    """Raise MismatchError unless new documents are captured at exactly the sites and layers of the store."""
    stored = {name: array.to_json() for name, array in store.arrays.items()}
    if given != stored:
        different = [
            f"{name}: {_layers(stored.get(name))} in the store, {_layers(given.get(name))} asked for"
            for name in sorted({*stored, *given})
            if stored.get(name) != given.get(name)
        ]
        raise MismatchError(
            "new documents are captured at all sites and layers of the store, and at no others",
            where=str(store.path),
            found="\n    ".join(["", *different[:12]]),
            remedy="add sites and layers on the existing documents first, then the documents; if the store has"
            " transforms, give their functions again",
        )


def _layers(array: dict[str, Any] | None) -> str:
    if array is None:
        return "nothing"
    return f"{array['dtype']} rows of {array['features']}, layers {array['layers']}"
