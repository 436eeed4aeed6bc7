"""Extending a store: more documents, more layers, another site, without touching what is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

from flexcache import hooks
from flexcache.documents import Documents, open_documents
from flexcache.documents.digest import same_corpus
from flexcache.errors import ConfigError, MismatchError
from flexcache.identity import comparable, model_key
from flexcache.images.input import stored_image_input
from flexcache.model import (
    CHAT_TEMPLATE,
    describe_tokenizer,
    encoder_vocabulary,
    evaluating,
    pad_id,
    positions,
    vocabulary,
)
from flexcache.paths import shown
from flexcache.recording.argument_order import either_order
from flexcache.recording.arguments import model_of, objective_of, tokenizer_of
from flexcache.recording.checks.attention_isolation import check_isolation
from flexcache.recording.checks.padding import check_batching, find_batching
from flexcache.recording.forward.capture_targets import CaptureTargets, find_targets, measure_arrays
from flexcache.recording.forward.image_inputs import check_images, padding
from flexcache.recording.forward.objective import OBJECTIVE, Objective, describe_objective
from flexcache.recording.forward.transform import Transform
from flexcache.recording.planning.extension_request import (
    Extension,
    check_equal,
    more_arrays,
    more_documents,
    opened,
    tokens_of,
)
from flexcache.recording.planning.planning import check_same
from flexcache.recording.recompute import check_rows
from flexcache.recording.run.cuda_transfer import transfer_for
from flexcache.recording.run.fingerprint import check_fingerprint, fingerprint, model_notices
from flexcache.recording.run.forward_loop import complete_store
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress
from flexcache.recording.run.recorder import DEFAULT_BUFFER, Recorder
from flexcache.site import Layers
from flexcache.spec import ArraySpec, SitesLike, Spec, check_running, listed, parse_sites, validate
from flexcache.store.format.metadata import stored_batching
from flexcache.store.manage.extension_transaction import AlreadyCommittedError, ExtensionTransaction
from flexcache.store.manage.staging import merge_arrays
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, local
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT


@either_order
def extend(
    model: Any,
    tokenizer: Any,
    documents: Any = None,
    path: str | os.PathLike | StoreLocation | None = None,
    *,
    sites: SitesLike | None = None,
    layers: Layers = "all",
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    new_only: bool = False,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    buffer_bytes: int = DEFAULT_BUFFER,
    allow_mixed: bool = False,
    allow_changed_model: bool = False,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    model_info: dict[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """Add to a complete store: documents, at all of its sites; or sites and layers, on all of its documents.

    What is new is staged inside the store and put in place once it is complete; until then, and at every moment after,
    the store reads as before. The same call goes on where one stopped, and any number of processes may make it, as with
    `flexcache.capture`. Old rows keep their numbers and bytes. Everything else is as in the store: model, tokenizer,
    rows, dtype, maximum length, size of the units.

        flexcache.extend(model, tokenizer, more_documents, "run.zarr")
        flexcache.extend(model, tokenizer, path="run.zarr", sites=["mlp_out"], layers="8:16")

    Parameters
    ----------
    model, tokenizer
        Those that the store was captured with; compared by configuration and weights. Of images, the image processor,
        or None for what the store says of it.
    documents
        More documents. None, or the corpus with which the store was begun, where sites or layers are added.
    path
        The store. It may also come before the documents: what is a store is the path.
    sites, layers, transforms, objective
        What is to be there, as for `flexcache.capture`; what is there already stays and is not computed again. With
        new documents they may be left out, and cannot add anything; functions have to be given again.
    new_only
        Leave out documents whose ids the store has: for a corpus that has grown.
    max_tokens
        Tokens of all documents of the store together, old and new: the document that reaches them is the last. The
        corpus that a smaller number ended goes on where it ended, also without *new_only*.
    batch_tokens
        At most what the store was planned with.

    Other parameters are those of `flexcache.capture`.

    Returns
    -------
    Store, complete

    Raises
    ------
    StoreError
        The path is no store, or not complete.
    MismatchError
        The model, the tokenizer, an array or the objective differ from those of the store, with what differs; or
        another extension was begun.
    DocumentsError
        Known documents and new ones are mixed without *new_only*, or a known id has other contents.
    ConfigError
        Nothing is asked for, or new documents and new sites at a time.
    SiteError, PlanError, CaptureError, RangeError
        As for `flexcache.capture`. Nothing of the store is lost.
    """
    root = local(path, "flexcache extend")
    store = opened(root)
    corpus = None if documents is None else open_documents(documents, images_first=bool(store.images))
    running = check_running(
        buffer_bytes, heartbeat_timeout, model_info, "extend", batch_tokens=batch_tokens, max_tokens=max_tokens
    )
    max_tokens = running.max_tokens
    transforms = listed(transforms, Transform, "transforms")
    model = model_of(model)
    tokenizer = tokenizer_of(tokenizer, model)
    objective = objective_of(objective, tokenizer)
    if store.images:
        tokenizer = stored_image_input(store, model, tokenizer)
    asked = _asked(store, sites, layers, transforms, objective)
    if corpus is None and asked is None:
        raise ConfigError(
            "nothing is asked for that the store does not have",
            where=str(root),
            expected="documents that it does not have, or sites, layers or transforms",
        )
    with evaluating(model), CaptureProgress(progress) as bars, closing(ModelParallelGroup(model)) as group:
        example = tokenizer.example(model) if store.images else None
        parse_metadata = group.describe_model(model, example)
        changed = check_source(store, parse_metadata, tokenizer, allow_changed_model)
        for line in model_notices(store.provenance.get("model", {}), parse_metadata, changed):
            bars.say(line)

        def read(spec: Spec) -> tuple[CaptureTargets, list[ArraySpec]]:
            targets = find_targets(model, spec, transforms, objective, group.remote_modules())
            group.check_targets(targets)
            example = check_images(model, spec, targets, tokenizer, group.processes)
            arrays = measure_arrays(model, spec, targets, group.read_example, example)
            hooks.check_identity(model, targets.points, example=example, reader=group.read_example, alone=group.alone)
            if spec.isolated:
                check_isolation(model, targets, pad_id(model, tokenizer), group)
            if merge_arrays(store, arrays)[1] or stored_batching(store.provenance) is None:
                check_batching(store, find_batching(model, targets, padding(model, tokenizer), spec, group))
            return targets, arrays

        everything = Spec.model_validate(store.spec)
        spec = asked or everything
        targets, arrays = read(spec)
        now = fingerprint(model, group.sizes.tp) | ({"model": model_key(parse_metadata)} if changed else {})
        check_fingerprint(store, now, allow_mixed)
        if not changed:
            check_rows(model, store, padding(model, tokenizer), group, now)
        planning = bars.planning(None)
        try:
            found: Extension | None
            if corpus is None or merge_arrays(store, arrays)[1]:
                _check_known(store, corpus)
                found = more_arrays(root, arrays, spec, planning.wait)
            elif (same := _same_files(store, corpus)) and everything.max_tokens is None:
                found = None
            else:
                if asked is not None:  # what the store has stays, whether it is named or not
                    targets, arrays = read(everything)
                _check_whole(store, {array.name: array.to_json() for array in arrays})
                _check_objective(store, targets, objective)
                found = more_documents(
                    root,
                    corpus,
                    tokenizer,
                    vocabulary=vocabulary(model),
                    encoder_vocabulary=encoder_vocabulary(model),
                    positions=positions(model),
                    new_only=new_only or same,
                    max_tokens=max_tokens,
                    progress=planning,
                    on_wait=planning.wait,
                )
            planning.done(found is not None and found.carried is not None)
            if found is None:
                bars.say(f"{shown(root)} has {_enough(store, corpus, max_tokens) or 'all of it'}: nothing to do")
                return Store(root)
            wanted = set(found.keys)
            targets = _narrowed(targets, wanted)
            with found.transaction.watch_commit():
                recorder = Recorder(
                    found.transaction.folder,
                    fingerprint=now,
                    buffer_bytes=running.buffer_bytes,
                    allow_mixed=allow_mixed,
                    transfer=transfer_for(model),
                    batch_tokens=running.batch_tokens,
                    keys=group.keys(targets.points, [(OBJECTIVE, None)] if (OBJECTIVE, None) in wanted else ()),
                    existing=found.carried,
                    heartbeat_timeout=running.heartbeat_timeout,
                    on_start=found.transaction.check_open if group.alone else lambda: None,
                )
            unchanged = partial(group.check_unchanged, model, parse_metadata, str(path), example)
            complete_store(model, tokenizer, targets, recorder, bars, group, root, unchanged=unchanged)
        except AlreadyCommittedError:
            bars.say("other processes have completed it meanwhile")
        ExtensionTransaction(root).commit(bars.committing())
        bars.say(f"in place → {shown(root)}")
    return Store(root)


def check_source(store: Store, model: dict[str, Any], tokenizer: Any, allow_changed_model: bool = False) -> list[str]:
    """Return what differs between the model of a store and the one at hand, if that is allowed.

    Raises
    ------
    MismatchError
        The model or the tokenizer is not the one that the store was captured with.
    """
    stored = store.provenance
    chat = CHAT_TEMPLATE in (stored.get("tokenizer") or {})
    return check_same(
        {"model": comparable(stored.get("model", {})), "tokenizer": stored.get("tokenizer")},
        {"model": model, "tokenizer": describe_tokenizer(tokenizer, chat)},
        store.path,
        allow_changed_model=allow_changed_model,
    )


def _asked(
    store: Store,
    sites: SitesLike | None,
    layers: Layers,
    transforms: Sequence[Transform],
    objective: Objective | None,
) -> Spec | None:
    """Return the store's spec with the sites that are asked for, or None where none are."""
    if sites is None and not transforms:
        if layers == "all":
            return None
        sites = list(store.spec.get("sites", {}))
    changes = {
        "sites": parse_sites(() if sites is None else sites, layers, optional=bool(transforms)),
        "transforms": {transform.name: transform.describe() for transform in transforms},
        "objective": None if objective is None else describe_objective(objective),
    }
    return validate(Spec, {**store.spec, **changes}, "extend")


def _same_files(store: Store, corpus: Documents) -> bool:
    """Whether a corpus is that of files which the store was begun with."""
    said = corpus.describe()
    return bool(said["files"]) and same_corpus(store.provenance.get("documents") or {}, said)


def _enough(store: Store, corpus: Documents | None, max_tokens: int | None) -> str | None:
    """Say why documents are not asked for, where the store has as many tokens as it may."""
    if corpus is None or max_tokens is None or (tokens := tokens_of(store)) < max_tokens:
        return None
    return f"{tokens:,} tokens of documents, and max_tokens is {max_tokens:,}"


def _check_objective(store: Store, targets: CaptureTargets, objective: Objective | None) -> None:
    """Refuse to store gradients of another objective beside those of the store."""
    if targets.objective is not None:
        check_equal(
            store,
            "the objective",
            store.spec.get("objective"),
            None if objective is None else describe_objective(objective),
        )


def _check_known(store: Store, corpus: Documents | None) -> None:
    """Refuse new sites together with another corpus than that which the store was begun with."""
    if corpus is not None and not same_corpus(store.provenance.get("documents") or {}, corpus.describe()):
        raise ConfigError(
            "documents and sites are to be added at a time",
            where=str(store.path),
            expected=f"the corpus of the store, {_corpus(store.provenance.get('documents', {}))}, or its sites",
            found=_corpus(corpus.describe()),
            remedy="add the sites first, on the documents that are there, then the documents",
        )


def _corpus(said: dict[str, Any]) -> str:
    names = ", ".join(f"{file['name']} ({file['bytes']} bytes)" for file in said.get("files", [])[:4])
    return f"{said.get('kind')} {names or said.get('count')}"


def _check_whole(store: Store, given: dict[str, Any]) -> None:
    """Refuse new documents at other sites than those of the store."""
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
            remedy="add sites and layers on the documents that are there first, then the documents; where the store has"
            " transforms, give their functions again",
        )


def _layers(array: dict[str, Any] | None) -> str:
    if array is None:
        return "nothing"
    return f"{array['dtype']} rows of {array['features']}, layers {array['layers']}"


def _narrowed(targets: CaptureTargets, wanted: set[tuple[str, int | None]]) -> CaptureTargets:
    """Return a reading of the points that fill wanted arrays and layers."""
    sources = {
        text: kept
        for text, points in targets.sources.items()
        if (kept := tuple(point for point in points if (point.array, point.layer) in wanted))
    }
    gradients = any(point.gradient for points in sources.values() for point in points)
    return CaptureTargets(sources, targets.transforms, targets.objective if gradients else None)
