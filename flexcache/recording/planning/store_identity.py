"""Compare what a store was made from with what a call is given, to resume it or to extend it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexcache.documents import Documents
from flexcache.documents.digest import DIGEST, same_corpus
from flexcache.errors import ConfigError, MismatchError
from flexcache.identity import check_model, comparable_record, differences
from flexcache.identity.tokenizer import CHAT_TEMPLATE, describe_tokenizer
from flexcache.spec import CaptureSpec
from flexcache.store.format.schema import read_attributes
from flexcache.store.format.text import join_lines, shorten
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation

DOCUMENTS_DIGEST = f"documents.{DIGEST}"
FIXED = (
    *("rows", "choice", "dtype", "max_length", "windows", "packing", "token_labels", "seed", "compression"),
    *("keep_text", "keep_dtype", "empty_documents", "segment_tokens", "special_tokens", "chat"),
)
"""Fields of a `CaptureSpec` that an extension takes from its store."""


def check_same(
    stored: dict[str, Any], given: dict[str, Any], path: StoreLocation, *, allow_changed_model: bool = False
) -> list[str]:
    """Return the differences between the model of a store and the given one, if they are allowed.

    MismatchError, with the values, if anything but the model differs, or the model and not *allow_changed_model*.
    """
    stored_model, model = (part.get("model") or {} for part in (stored, given))
    before, now = (_flat({key: part for key, part in held.items() if key != "model"}) for held in (stored, given))
    for held in (before, now):
        held.pop("spec.objective.tokens", None)  # stores of an earlier version lack them; the state covers them
    budget = "spec.batch_tokens"
    if None in (before.get(DOCUMENTS_DIGEST), now.get(DOCUMENTS_DIGEST)):  # of an earlier version, or of a generator
        before.pop(DOCUMENTS_DIGEST, None)
        now.pop(DOCUMENTS_DIGEST, None)
    if now.get(budget, 0) < before.get(budget, 0):
        now[budget] = before[budget]  # smaller forward passes over the same plan
    different = [
        f"{name}: {_shown(before.get(name, 'nothing'))} in the store, {_shown(now.get(name, 'nothing'))} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if different:
        different += differences(stored_model, model)
        raise MismatchError(
            "the store was made from something else",
            where=str(path),
            found=join_lines(different),
            remedy="give the same configuration to resume it, or another path for a new store",
        )
    return check_model(stored_model, model, str(path), allow=allow_changed_model)


def stored_identity(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of `PlanInputs.identity` from the attributes of a store."""
    provenance = attributes["provenance"]
    return {
        "spec": attributes["spec"],
        "arrays": attributes["arrays"],
        "model": provenance["model"],
        "tokenizer": provenance["tokenizer"],
        "documents": provenance["documents"],
    }


def check_source(store: Store, model: dict[str, Any], tokenizer: Any, allow_changed_model: bool = False) -> list[str]:
    """Return the differences between the model of a store and the given one, if they are allowed.

    MismatchError if the model or the tokenizer is not the one that the store was captured with.
    """
    stored = store.provenance
    chat = CHAT_TEMPLATE in (stored.tokenizer or {})
    return check_same(
        {"model": comparable_record(stored.model), "tokenizer": stored.tokenizer},
        {"model": model, "tokenizer": describe_tokenizer(tokenizer, chat, store.spec.chat)},
        store.path,
        allow_changed_model=allow_changed_model,
    )


def check_fixed(store: Store, spec: CaptureSpec) -> None:
    """Raise MismatchError if a spec sets a field that determines the rows of a store to another value.

    ConfigError if it asks for completions.
    """
    if spec.generate is not None:
        raise ConfigError(
            "a store is not extended by completions that are not made yet",
            where="generate",
            remedy="make them by flexcache.generate, or by a capture of their own, and give their files as documents",
        )
    CaptureSpec.from_store(read_attributes(store.path)["spec"])  # a field of a later version is an error
    given = {name for name in FIXED if name in spec.model_fields_set}
    asked, before = (one.model_dump(mode="json") for one in (spec, store.spec))
    different = [
        f"{name}: {_shown(before.get(name, left))} in the store, {_shown(asked.get(name, left))} in the configuration"
        for name in FIXED
        for left in ["auto" if name == "special_tokens" else "nothing"]  # defaults that a spec leaves out
        if name in given and asked.get(name) != before.get(name)
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


def same_files(store: Store, corpus: Documents) -> bool:
    """Return True if a corpus consists of the files that the store was begun with."""
    description = corpus.describe()
    return bool(description["files"]) and same_corpus(store.provenance.documents, description)


def check_equal(store: Store, what: str, before: Any, now: Any) -> None:
    """Raise MismatchError if *before*, of the store, differs from *now*."""
    if before != now:
        raise MismatchError(
            f"{what} differs from that of the store", where=str(store.path), expected=str(before), found=str(now)
        )


def check_known(store: Store, corpus: Documents | None) -> None:
    """Raise ConfigError if new sites are asked for together with another corpus than that of the store."""
    if corpus is not None and not same_corpus(store.provenance.documents, corpus.describe()):
        raise ConfigError(
            "documents and sites cannot be added together",
            where=str(store.path),
            expected=f"the corpus of the store, {_corpus(store.provenance.documents)}, or its sites",
            found=_corpus(corpus.describe()),
            remedy="add the sites first, on the existing documents, then the documents",
        )


def check_whole(store: Store, given: dict[str, Any]) -> None:
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


def _corpus(description: Mapping[str, Any]) -> str:
    names = ", ".join(f"{file['name']} ({file['bytes']} bytes)" for file in description.get("files", [])[:4])
    return f"{description.get('kind')} {names or description.get('count')}"


def _layers(array: dict[str, Any] | None) -> str:
    if array is None:
        return "nothing"
    return f"{array['dtype']} rows of {array['features']}, layers {array['layers']}"


def _shown(value: Any) -> str:
    """Return a value as text; the text of a chat template is long."""
    return shorten(str(value), 400)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}
