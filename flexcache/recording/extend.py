"""Extend a store by documents, layers or sites, without changing existing rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any, Unpack

from flexcache import hooks
from flexcache.array_spec import ArraySpec, check_one_window
from flexcache.documents import Documents, open_documents
from flexcache.errors import ConfigError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.position_tables import count_positions
from flexcache.hooks.locate.vocabulary import encoder_vocabulary_size, pad_token_id, vocabulary_size
from flexcache.identity import model_key
from flexcache.images.input import stored_image_input
from flexcache.paths import shown
from flexcache.provenance import select_fingerprint
from flexcache.recording.arguments import described, either_order, model_of, objective_of, tokenizer_of
from flexcache.recording.checks.attention_isolation import check_isolation
from flexcache.recording.checks.padding import check_batching, find_batching
from flexcache.recording.fields import ExtendFields, split_fields
from flexcache.recording.forward.capture_targets import CaptureTargets, find_targets, measure_arrays
from flexcache.recording.forward.image_inputs import check_images, padding
from flexcache.recording.forward.objective import OBJECTIVE, Objective
from flexcache.recording.forward.transform import Transform
from flexcache.recording.planning.extension_request import (
    Extension,
    as_stored,
    more_arrays,
    more_documents,
    opened,
    tokens_of,
)
from flexcache.recording.planning.store_identity import (
    check_equal,
    check_fixed,
    check_known,
    check_source,
    check_whole,
    same_files,
)
from flexcache.recording.recompute import check_rows
from flexcache.recording.run.cuda_transfer import transfer_for
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.fingerprint import check_fingerprint, fingerprint, model_notices
from flexcache.recording.run.forward_loop import complete_store
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress
from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run_options import RunOptions
from flexcache.sequences.special_tokens import DOUBLED, doubled_notice
from flexcache.spec import CaptureSpec, listed, parse_sites
from flexcache.store.format.int8 import with_scales
from flexcache.store.manage.derive import merge_arrays
from flexcache.store.manage.extension_transaction import AlreadyCommittedError, ExtensionTransaction
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, local
from flexcache.validation import validate


@either_order
def extend(
    model: Any,
    tokenizer: Any,
    documents: Any = None,
    path: str | os.PathLike | StoreLocation | None = None,
    spec: CaptureSpec | None = None,
    *,
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    new_only: bool = False,
    options: RunOptions | None = None,
    **fields: Unpack[ExtendFields],
) -> Store:
    """Add documents to a complete store, at all of its sites; or sites and layers, on all of its documents.

        flexcache.extend(model, tokenizer, more_documents, "run.zarr")
        flexcache.extend(model, tokenizer, path="run.zarr", sites=["mlp_out"], layers="8:16")

    New content is staged inside the store and committed once it is complete; at every moment, the store can be read.
    The same call resumes an extension that was stopped, and any number of processes may make it, as with
    `flexcache.capture`. Existing rows keep their numbers and bytes. Everything else is as in the store: model,
    tokenizer, rows, dtype, maximum length, and size of the units.

    Parameters
    ----------
    model, tokenizer
        Those that the store was captured with; compared by configuration and weights. For images, the image processor,
        or None for the one that the store describes.
    documents
        More documents; to add sites or layers, None or the corpus of the store.
    path
        The store. It may also come before the documents: the argument that is a store is the path.
    spec, options
        As for `flexcache.capture`; their fields can also be given one by one, as *fields*. A spec must agree with the
        store in the fields that determine its rows.
    transforms, objective
        As for `flexcache.capture`. Functions have to be given again.
    new_only
        Leave out documents whose ids the store has: for a corpus that has grown.
    **fields
        *sites* and *layers* that the store is to have; those that exist are not computed again, and virtual layers stay
        virtual. New ones are on disk, unless *spec* has a *keep* that leaves them out. With new documents
        they may be left out, and cannot add anything. *max_tokens* counts the tokens of all documents of the store, old
        and new; the document that reaches this number is the last. A corpus that a smaller number ended is continued
        there, also without *new_only*. *batch_tokens* is at most that of the store's plan.

    Returns
    -------
    Store, complete

    Raises
    ------
    StoreError
        The path is not a store, or the store is not complete.
    MismatchError
        The model, the tokenizer, an array, the objective or a field of *spec* differs from that of the store; or
        another extension was begun.
    DocumentsError
        Known documents and new ones are mixed without *new_only*, or a known id has other contents.
    ConfigError
        Nothing is asked for, or new documents and new sites together.
    SiteError, PlanError, CaptureError, RangeError
        As for `flexcache.capture`. Nothing of the store is lost.
    """
    where = "flexcache.extend"
    root = local(path, "flexcache extend")
    store = opened(root)
    corpus = None if documents is None else open_documents(documents, images_first=bool(store.images))
    spec, content, options = split_fields(fields, ExtendFields, spec, options, where)
    changes = {name: content.pop(name) for name in ("max_tokens", "batch_tokens") if content.get(name) is not None}
    spec = spec.with_fields(changes, where)
    check_fixed(store, spec)
    max_tokens = spec.max_tokens
    transforms = listed(transforms, Transform, "transforms")
    model = model_of(model)
    tokenizer = tokenizer_of(tokenizer, model)
    objective = objective_of(objective, tokenizer)
    if store.images:
        tokenizer = stored_image_input(store.provenance.tokenizer, model, tokenizer, where=str(root))
    functions = described(transforms, objective)
    asked = _asked(store, spec, content, functions, where)
    if corpus is None and asked is None:
        raise ConfigError(
            "the store has everything that is asked for",
            where=str(root),
            expected="documents that it does not have, or sites, layers or transforms",
        )
    with evaluation_mode(model), CaptureProgress(options.progress) as bars, closing(ModelParallelGroup(model)) as group:
        example = tokenizer.example(model) if store.images else None
        model_description = group.describe_model(model, example)
        changed = check_source(store, model_description, tokenizer, options.allow_changed_model)
        for line in model_notices(store.provenance.model, model_description, changed):
            bars.say(line)

        def read(spec: CaptureSpec) -> tuple[CaptureTargets, list[ArraySpec]]:
            targets = find_targets(model, spec, transforms, objective, group.remote_modules())
            group.check_targets(targets)
            example = check_images(model, spec, targets, tokenizer, group.processes)
            arrays = with_scales(measure_arrays(model, spec, targets, group.read_example, example), store.arrays)
            arrays = as_stored(store, arrays)
            hooks.check_sites(model, targets.points, example=example, reader=group.read_example, alone=group.alone)
            if spec.isolated:
                check_isolation(model, targets, pad_token_id(model, tokenizer), group)
            if merge_arrays(store.arrays, arrays)[1] or store.provenance.batching is None:
                check_batching(store, find_batching(model, targets, padding(model, tokenizer), spec, group))
            return targets, arrays

        everything = store.spec
        wanted_spec = asked or everything
        targets, arrays = read(wanted_spec)
        now = fingerprint(model, group.sizes.tp) | ({"model": model_key(model_description)} if changed else {})
        check_fingerprint(store, now, options.allow_mixed)
        if not changed:
            check_rows(model, store, padding(model, tokenizer), group, now)
        planning = bars.planning(None)
        try:
            found: Extension | None
            if corpus is None or merge_arrays(store.arrays, arrays)[1]:
                check_known(store, corpus)
                found = more_arrays(root, arrays, wanted_spec, planning.wait)
            elif (same := same_files(store, corpus)) and everything.max_tokens is None:
                found = None
            else:
                if asked is not None:  # existing arrays stay, whether they are named or not
                    targets, arrays = read(everything)
                check_whole(store, {array.name: array.to_json() for array in arrays})
                if targets.objective is not None:
                    recorded, given = (
                        select_fingerprint(one) for one in (store.spec.objective, functions["objective"])
                    )
                    check_equal(store, "the objective", recorded, given)
                found = more_documents(
                    root,
                    corpus,
                    tokenizer,
                    vocabulary=vocabulary_size(model),
                    encoder_vocabulary=encoder_vocabulary_size(model),
                    positions=count_positions(model),
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
                    buffer_bytes=options.buffer_bytes,
                    allow_mixed=options.allow_mixed,
                    transfer=transfer_for(model),
                    batch_tokens=spec.batch_tokens if "batch_tokens" in spec.model_fields_set else None,
                    keys=group.keys(targets.points, [(OBJECTIVE, None)] if (OBJECTIVE, None) in wanted else ()),
                    existing=found.carried or ExistingRows(store, stop=0),
                    on_start=found.transaction.check_open if group.alone else lambda: None,
                    heartbeat_timeout=options.heartbeat_timeout,
                )
            unchanged = partial(group.check_unchanged, model, model_description, str(path), example)
            complete_store(model, tokenizer, targets, recorder, bars, group, root, unchanged=unchanged)
        except AlreadyCommittedError:
            bars.say("other processes have completed it in the meantime")
        ExtensionTransaction(root).commit(bars.committing())
        bars.say(f"in place → {shown(root)}")
        extended = Store(root)
        if doubled := extended.plan.get(DOUBLED, 0) - store.plan.get(DOUBLED, 0):
            bars.say(doubled_notice(doubled))
        for table in extended.label_tables.values():
            if text := table.describe_later(int(extended.plan["documents"])):
                bars.say(text)
    return extended


def _asked(
    store: Store, spec: CaptureSpec, content: dict[str, Any], functions: dict[str, Any], where: str
) -> CaptureSpec | None:
    """Return the spec of the store with the sites that are asked for, or None if there are none."""
    sites, layers = content.get("sites"), content.get("layers", "all")
    if sites is None and "sites" in spec.model_fields_set:
        sites = list(spec.sites) if "layers" in content else spec.sites
    if sites is None and not functions["transforms"]:
        if isinstance(layers, str) and layers == "all":
            return None
        sites = list(store.spec.sites)
    asked = parse_sites(() if sites is None else sites, layers, optional=bool(functions["transforms"]))
    kept: dict[str, Any] = {}
    if spec.keep is not None:
        kept = {"keep": {site: layers for site, layers in spec.keep.items() if site in asked}}
    elif store.spec.keep is not None:
        kept = {"keep": dict.fromkeys(asked, "all")}
    given = validate(CaptureSpec, {**store.spec.to_json(), **functions, **kept, "sites": asked}, where, stored=True)
    if spec.keep is not None:
        given.check_keep()
        check_one_window(given.keep, store.tokens.column("start").to_numpy() > 0)
    return given


def _narrowed(targets: CaptureTargets, wanted: set[tuple[str, int | None]]) -> CaptureTargets:
    """Return the targets restricted to the hook points of wanted arrays and layers."""
    sources = {
        text: kept
        for text, points in targets.sources.items()
        if (kept := tuple(point for point in points if (point.array, point.layer) in wanted))
    }
    gradients = any(point.gradient for points in sources.values() for point in points)
    return CaptureTargets(sources, targets.transforms, targets.objective if gradients else None)


def _enough(store: Store, corpus: Documents | None, max_tokens: int | None) -> str | None:
    """Return why no documents are added if the store has reached *max_tokens*, else None."""
    if corpus is None or max_tokens is None or (tokens := tokens_of(store)) < max_tokens:
        return None
    return f"{tokens:,} tokens of documents, and max_tokens is {max_tokens:,}"
