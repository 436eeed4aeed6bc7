"""Capture: a model runs over documents once, and the activations at its sites become a store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from flexcache import hooks
from flexcache.documents import open_documents
from flexcache.hooks.locate.vision import reads_images
from flexcache.identity import model_key
from flexcache.images.input import model_input
from flexcache.model import (
    describe_tokenizer,
    encoder_vocabulary,
    evaluating,
    longest_input,
    pad_id,
    positions,
    vocabulary,
)
from flexcache.options import Choice, DecoderInputMode, Packing, Windows, parse_rows
from flexcache.recording.arguments import model_of, objective_of, tokenizer_of
from flexcache.recording.checks.attention_isolation import check_isolation
from flexcache.recording.checks.padding import batching_notice, check_batching, find_batching, has_batching
from flexcache.recording.forward.capture_targets import find_targets, measure_arrays
from flexcache.recording.forward.decoder_inputs import infer_decoder_inputs
from flexcache.recording.forward.image_inputs import check_images, describe_patches, padding
from flexcache.recording.forward.objective import OBJECTIVE, Objective, describe_objective
from flexcache.recording.forward.transform import Transform
from flexcache.recording.planning.planning import Source, check_same, plan_store, stored_identity
from flexcache.recording.recompute import check_rows
from flexcache.recording.run.cuda_transfer import transfer_for
from flexcache.recording.run.fingerprint import fingerprint, model_notices
from flexcache.recording.run.forward_loop import complete_store
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress
from flexcache.recording.run.recorder import DEFAULT_BUFFER, Recorder
from flexcache.site import Layers
from flexcache.spec import SitesLike, Spec, check_running, listed, parse_sites, validate
from flexcache.store.format.metadata import stored_batching
from flexcache.store.format.schema import read_attributes
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, parse_location
from flexcache.store.write.create import check_target
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT


def capture(
    model: Any,
    tokenizer: Any,
    documents: Any,
    path: str | os.PathLike | StoreLocation,
    *,
    sites: SitesLike | None = None,
    layers: Layers = "all",
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    rows: str | Mapping[str, Any] | Choice = "all",
    dtype: Any = "auto",
    max_length: int | None = None,
    max_tokens: int | None = None,
    windows: Windows | Mapping[str, Any] | None = None,
    packing: Packing | Mapping[str, Any] | None = None,
    token_labels: Sequence[str] = (),
    decoder_inputs: DecoderInputMode = "shifted",
    batch_tokens: int = 4096,
    seed: int = 0,
    compression: str = "none",
    keep_text: bool = True,
    empty_documents: str = "error",
    buffer_bytes: int = DEFAULT_BUFFER,
    allow_mixed: bool = False,
    allow_changed_model: bool = False,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    model_info: dict[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """Run a model over documents and store the activations at *sites*; go on where an earlier run stopped.

    The model is left as it was: hooks are removed, training mode restored. The forward stops after the last site
    has fired, so later blocks and the lm_head are never computed.

    Any number of processes may call this for one store at the same time, under a launcher or not, on one machine or on
    many that share a file system: one makes the plan, each computes units that no other does, and all return when the
    store is complete. What was begun by one that ends is computed by another. Processes that hold one model between
    them (tensor parallel, FSDP, transformers' pipelines) call it together: each writes the activations that it owns.

    Parameters
    ----------
    model
        Any transformers model with token ids as input, or a vision transformer (blocks that read one token a patch), on
        any device. Of a model with an encoder and a decoder, rows are the decoder's, of documents with a ``target``;
        for the encoder's, pass ``model.get_encoder()``. In a pipeline of torch, this process's `PipelineStage`, or a
        list of them; see `flexcache.parallel.stages`. A folder or a name on the hub is loaded, see
        `flexcache.ModelSource`.
    tokenizer
        The model's tokenizer; None where documents have ``tokens``. Of a vision transformer, its image processor. A
        folder or a name is loaded, too.
    documents
        Dicts ``{"id", "text" | "tokens" | "messages" | "image", any labels}``, a path, a table or a dataset; see
        `flexcache.open_documents`. A vision transformer reads the image of documents that have more than one. For an
        encoder and a decoder, text or tokens are what the encoder reads, and ``target`` or ``target_tokens`` what the
        decoder does.
    path
        The store. Where one made from the same arguments exists, its missing units are captured.
    sites, layers
        A site or several, see `flexcache.site`; by default ``resid_post``, or none where transforms are given. *layers*
        holds for those that do not name their own. A site that ends in ``.grad`` is the gradient of *objective* there,
        on the same rows.
    transforms
        Functions of activations whose results are stored.
    objective
        What gradients are of: `NextTokenLoss` by default, `LogitDifference` of two token ids or texts, or a function of
        the model's output and the `Batch`, see `flexcache.recording.Objective`. Its value is stored as
        ``objective``.
    rows
        ``"all"`` tokens, the ``"last"`` or ``"first"`` of each document, or the ``"mean"`` over it; or the rules of a
        `Choice`, such as ``{"every": 4}``, with ``"take"`` for which of the chosen tokens: ``"all"`` by default.
    dtype
        As stored: bfloat16, float16, float32, or int8 with a scale for each row, as a name or a dtype
        of torch or numpy; ``"auto"`` is as computed.
    max_length
        Tokens after which a document is truncated; by default what the model can read. A longer document than the model
        has positions for is refused before anything is planned.
    max_tokens
        Tokens of all documents together: the document that reaches them is the last one that is read.
    windows
        `Windows`, such as ``{"length": 1024, "stride": 512}``: longer documents are cut into windows instead, and each
        token's row is of the first window that has it.
    packing
        `Packing`, such as ``{"length": 1024}``: documents follow each other in sequences of that length; with
        ``"isolate": True`` as if each were alone.
    token_labels
        Columns of the documents with a label for each token, which go into the table of sequences; see
        `flexcache.sequences.labels.align_labels`.
    decoder_inputs
        Of a model with an encoder and a decoder: ``"shifted"``, targets as the model makes decoder inputs of labels,
        one place later behind the token to begin with; or ``"as_given"``.
    batch_tokens
        Most tokens of a forward, padding included; of an encoder and a decoder, of either. Going on with a store, it
        may be less than before; where a batch does not fit into the device's memory, it is halved.
        Documents of similar length share a batch, padded. Small forwards show first that padding reaches nothing that
        is read; where it does, batches hold sequences of one length only, or one sequence.
    buffer_bytes
        Bound on the memory for rows on their way to the disk.
    allow_mixed
        Go on with a store that was begun on another device, version or thread count.
    allow_changed_model
        Resume a store that was begun by a model which computes something else; the ledger says which units had which.
    heartbeat_timeout
        Seconds without a sign of life after which a process on another machine counts as gone.
    model_info
        More about the model for the provenance: its ``name``, ``revision``, the hashes of its ``files``.

    Returns
    -------
    Store, complete

    Raises
    ------
    SiteError
        A site or layer that the model does not have, or that its forward does not reach.
    DocumentsError, ConfigError, PlanError
        Before anything is computed.
    RangeError
        A value is not finite or does not fit *dtype*. Committed units are kept.
    MismatchError
        The store at *path* was made from something else: documents, options, or a model that computes something
        else, by any of its values or by what it gives on a small fixed input; see docs/reliability.md.
    CaptureError
        The disk refused a write. Committed units are kept.
    """
    path = parse_location(path)
    check_target(path)
    running = check_running(buffer_bytes, heartbeat_timeout, model_info, "capture")
    transforms, token_labels = listed(transforms, Transform, "transforms"), listed(token_labels, str, "token_labels")
    model = model_of(model)
    tokenizer = tokenizer_of(tokenizer, model)
    objective = objective_of(objective, tokenizer)
    sites = (() if transforms else "resid_post") if sites is None else sites
    spec = validate(
        Spec,
        {
            "sites": parse_sites(sites, layers, optional=bool(transforms)),
            "transforms": {transform.name: transform.describe() for transform in transforms},
            "objective": None if objective is None else describe_objective(objective),
            **parse_rows(rows),
            "dtype": dtype,
            "max_length": longest_input(model, tokenizer) if max_length is None else max_length,
            "max_tokens": max_tokens,
            "windows": windows,
            "packing": packing,
            "token_labels": token_labels,
            "decoder": infer_decoder_inputs(model, decoder_inputs),
            "batch_tokens": batch_tokens,
            "seed": seed,
            "compression": compression,
            "keep_text": keep_text,
            "empty_documents": empty_documents,
        },
        "capture",
    )
    spec.check()
    with evaluating(model), CaptureProgress(progress) as bars, closing(ModelParallelGroup(model)) as group:
        targets = find_targets(model, spec, transforms, objective, group.remote_modules())
        group.check_targets(targets)
        corpus = open_documents(documents, images_first=reads_images(model))
        tokenizer = model_input(model, tokenizer, corpus.content)
        example = check_images(model, spec, targets, tokenizer, group.processes)
        source = Source(
            documents=corpus,
            tokenizer=tokenizer,
            arrays=measure_arrays(model, spec, targets, group.read_example, example),
            spec=spec,
            model=group.describe_model(model, example) | (model_info or {}),
            tokenizer_identity=describe_tokenizer(tokenizer, corpus.content == "messages"),
            vocabulary=vocabulary(model),
            encoder_vocabulary=encoder_vocabulary(model),
            positions=positions(model),
            notes={"user_hooks": hooks.user_hooks(model)} | describe_patches(tokenizer),
        )
        hooks.check_identity(model, targets.points, example=example, reader=group.read_example, alone=group.alone)
        if spec.isolated:
            check_isolation(model, targets, pad_id(model, tokenizer), group)
        pad = padding(model, tokenizer)
        verdict = None if group.alone and has_batching(path) else find_batching(model, targets, pad, spec, group)
        if verdict is not None:
            notes = {**(source.notes or {}), **verdict.describe()}
            source = replace(source, batching=verdict.batching, notes=notes)
        planning = bars.planning(None)
        amount = plan_store(path, source, planning, planning.wait)
        planning.done(amount is not None)
        stored = stored_identity(read_attributes(path))
        changed = check_same(stored, source.identity(), path, allow_changed_model=allow_changed_model)
        for line in model_notices(stored["model"], source.model, changed):
            bars.say(line)
        for name, text in amount.lines() if amount else ():
            bars.say(f"  {name}: {text}")
        now = fingerprint(model, group.sizes.tp) | ({"model": model_key(source.model)} if changed else {})
        recorder = Recorder(
            path,
            fingerprint=now,
            buffer_bytes=running.buffer_bytes,
            allow_mixed=allow_mixed,
            transfer=transfer_for(model),
            batch_tokens=spec.batch_tokens,
            keys=group.keys(targets.points, [(OBJECTIVE, None)] if OBJECTIVE in stored["arrays"] else ()),
            heartbeat_timeout=running.heartbeat_timeout,
        )
        if not changed:
            check_rows(model, recorder.store, pad, group, now, most_tokens=recorder.batch_tokens)
        if (changed or stored_batching(recorder.store.provenance) is None) and recorder.pending():
            check_batching(recorder.store, verdict or find_batching(model, targets, pad, spec, group))
        if said := batching_notice(recorder.store):
            bars.say(said)
        unchanged = partial(group.check_unchanged, model, source.model, str(path), example)
        complete_store(model, tokenizer, targets, recorder, bars, group, unchanged=unchanged)
    return Store(path)
