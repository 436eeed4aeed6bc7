"""Stage an extension inside a store: more arrays and layers, or more documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from flexcache.array_spec import ArraySpec, check_one_window
from flexcache.errors import ConfigError, MismatchError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.provenance import select_fingerprint
from flexcache.recording.planning.new_documents import NewDocuments, NothingNewError
from flexcache.recording.planning.store_identity import check_equal
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.fingerprint import versions
from flexcache.sequences import Positions, tokenize_corpus
from flexcache.sequences.labels import CHAT
from flexcache.site import resolve_layers
from flexcache.spec import CaptureSpec
from flexcache.store.manage.continued_spec import continued_spec
from flexcache.store.manage.derive import keep_fields, merge_arrays
from flexcache.store.manage.extension_transaction import ExtensionTransaction, check_complete
from flexcache.store.manage.labels.tables import check_new_labels
from flexcache.store.manage.staging import plan_extension, stage_arrays, stage_documents
from flexcache.store.read.selection import ArrayKey, by_array, captured_keys
from flexcache.store.read.store import Store

if TYPE_CHECKING:
    from flexcache.documents import Documents


@dataclass(frozen=True)
class Extension:
    """A staged extension of a store, whose *transaction* commits it.

    Attributes
    ----------
    keys : list of (str, int or None)
        The arrays and layers to capture.
    carried : ExistingRows or None
        The rows before those of new documents.
    """

    transaction: ExtensionTransaction
    keys: list[ArrayKey]
    carried: ExistingRows | None = None


def opened(path: str | Path) -> Store:
    """Return a store that can be extended; an extension that is being committed is committed first.

    StoreError if the path is not a store, or the store is not complete; ConfigError if its rows were read while they
    were generated.
    """
    transaction = ExtensionTransaction(path)
    if transaction.committing:
        transaction.commit()
    store = Store(path)
    check_complete(store)
    if store.spec.decoding:
        raise ConfigError(
            "the rows of the store were read while they were generated, which other rows would not be",
            where=str(path),
            expected="a store that was captured without generate.capture",
            remedy="capture what is missing into another store",
        )
    return store


def more_arrays(
    path: Path, arrays: list[ArraySpec], asked: CaptureSpec, on_wait: Callable[[], None] = lambda: None
) -> Extension | None:
    """Stage arrays and layers over the documents of a store; return None if it has all of them.

    *arrays* are those that the store is to have, *asked* is a spec of their sites, layers, transforms and objective.
    The rest is as in the store.

    Raises
    ------
    MismatchError
        An array of the store has the same name but another form, or another extension was begun.
    PlanError
        The disk does not have enough space.
    """
    store, transaction = opened(path), ExtensionTransaction(path)
    _check_forms(store, arrays)
    together, new = merge_arrays(store.arrays, arrays)
    if not new:
        return None
    request = {"arrays": by_array(new)}
    named = {array.name: array for array in together}
    if virtual := [key for key in new if key[1] in named[key[0]].virtual]:
        request["virtual"] = by_array(virtual)

    def make(folder: Path) -> None:
        now = Store(path)
        if not merge_arrays(now.arrays, arrays)[1]:
            raise NothingNewError
        stage_arrays(now, folder, together, _spec_with(now, asked, together), request)

    try:
        transaction.stage(make, on_wait)
    except NothingNewError:
        return None
    transaction.check_request(request)
    return Extension(transaction, new)


def more_documents(
    path: Path,
    documents: Documents,
    tokenizer: Any,
    *,
    vocabulary: int | None = None,
    encoder_vocabulary: int | None = None,
    positions: Positions = (None, None),
    new_only: bool = False,
    max_tokens: int | None = None,
    progress: ProgressCallback = ignore_progress,
    on_wait: Callable[[], None] = lambda: None,
) -> Extension | None:
    """Stage documents after those of a store; return None if it has all of them.

    With *new_only*, documents whose ids the store has are left out. *max_tokens* counts the tokens of all documents,
    old and new; the document that reaches this number is the last.

    Raises
    ------
    DocumentsError
        Known and new documents are mixed, or a known id has other contents; see `flexcache.sequences.tokenize_corpus`.
    MismatchError
        Another extension was begun.
    PlanError
        The disk does not have enough space.
    """
    transaction = ExtensionTransaction(path)
    opened(path)
    request = {"documents": documents.describe(), "new_only": new_only}
    if max_tokens is not None:
        request["max_tokens"] = max_tokens

    def make(folder: Path) -> None:
        store = Store(path)
        check_new_labels(store, documents.labels)
        left = None if max_tokens is None else max_tokens - tokens_of(store)
        if left is not None and left <= 0:
            raise NothingNewError
        spec = continued_spec(store, tokenizer).model_copy(update={"max_tokens": left})
        *_, corpus = tokenize_corpus(
            NewDocuments(documents, store, new_only),
            tokenizer,
            folder.parent,
            spec,
            vocabulary=vocabulary,
            encoder_vocabulary=encoder_vocabulary,
            positions=positions,
            empty=spec.empty_documents,
            keep_text=spec.keep_text,
            chat_labels=[name for name in CHAT if name in store.token_labels] or CHAT,
            first_index=int(pc.max(store.documents.column("source_index")).as_py()) + 1,
            progress=progress,
        )
        check_one_window(spec.keep, corpus.segmentation.linked)
        entry = {"extended_by": request, "versions": versions()}
        stage_documents(store, folder, plan_extension(store, corpus), corpus, entry)

    try:
        transaction.stage(make, on_wait)
    except NothingNewError:
        return None
    transaction.check_request(request)
    store = Store(path)
    transaction.check_open()
    return Extension(transaction, captured_keys(store.arrays.values()), ExistingRows(store))


def as_stored(store: Store, arrays: list[ArraySpec]) -> list[ArraySpec]:
    """Return arrays that are asked for, in which the layers that are virtual in the store stay virtual."""
    found = []
    for array in arrays:
        held = store.arrays.get(array.name)
        stay = set(held.virtual).intersection(array.layers or ()) if held is not None else set()
        layers = None if array.layers is None else tuple(layer for layer in array.layers if layer not in stay)
        found.append(replace(array, layers=layers, virtual=tuple(sorted({*array.virtual, *stay}))))
    return found


def tokens_of(store: Store) -> int:
    """Return the number of tokens of all documents of a store, including those that are not rows."""
    return int(pc.sum(store.documents.column("n_tokens")).as_py())


def _check_forms(store: Store, arrays: list[ArraySpec]) -> None:
    """Raise MismatchError if the store has an array in another form."""
    for array in arrays:
        before = store.arrays.get(array.name)
        if before is not None and replace(before, layers=None, virtual=()) != replace(array, layers=None, virtual=()):
            raise MismatchError(
                f"array {array.name} of the store has another form",
                where=str(store.path),
                expected=str(before),
                found=str(array),
            )


def _spec_with(store: Store, asked: CaptureSpec, arrays: list[ArraySpec]) -> CaptureSpec:
    """Return the spec of the store with the arrays that are asked for."""
    stacked = {array.site: array for array in arrays if array.layers is not None}
    sites = dict(store.spec.sites)
    for site, layers in asked.sites.items():
        sites[site] = _layers(sites.get(site), layers, stacked.get(site))
    transforms = dict(store.spec.transforms)
    by_name = {array.name: array for array in arrays}
    for name, said in asked.transforms.items():
        before = transforms.get(name)
        if before is None:
            transforms[name] = said
            continue
        check_equal(store, f"transform {name}", _but_layers(before), _but_layers(said))
        array = by_name.get(name)
        transforms[name] = {**said, "layers": _layers(before.get("layers"), said.get("layers"), array)}
    objective = store.spec.objective
    gradients = any(array.site.endswith(".grad") for array in store.arrays.values())
    if gradients and any(site.endswith(".grad") for site in asked.sites):
        check_equal(store, "the objective", select_fingerprint(objective), select_fingerprint(asked.objective))
    objective = asked.objective if objective is None else objective
    forms = {**(asked.keep or {}), **(store.spec.keep or {})}
    spec = store.spec.model_copy(update={"keep": forms} if forms else {})
    changes = {"sites": sites, "transforms": transforms, "objective": objective, **keep_fields(arrays, spec)}
    return spec.model_copy(update=changes)


def _layers(before: Any, asked: Any, array: ArraySpec | None) -> Any:
    """Return layers as they were asked for if the array has exactly these, else the numbers of its layers."""
    if before is None or before == asked or array is None or array.layers is None or array.depth is None:
        return asked
    return asked if tuple(resolve_layers(asked, array.depth)) == array.captured else list(array.captured)


def _but_layers(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if key != "layers"}
