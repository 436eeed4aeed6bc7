"""Capture: run a model over documents once and store the activations at its sites."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

from flexcache import hooks
from flexcache.documents import Documents, open_documents
from flexcache.errors import ConfigError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.position_tables import count_positions, longest_input
from flexcache.hooks.locate.vision import reads_images
from flexcache.hooks.locate.vocabulary import encoder_vocabulary_size, pad_token_id, vocabulary_size
from flexcache.identity import model_key
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.images.input import model_input
from flexcache.recording.arguments import described, model_of, objective_of, tokenizer_of
from flexcache.recording.checks.attention_isolation import check_isolation
from flexcache.recording.checks.padding import batching_notice, check_batching, find_batching, has_batching
from flexcache.recording.checks.passed import PassedChecks
from flexcache.recording.completions import Completions
from flexcache.recording.decoding import DecodedCompletions, capture_completions
from flexcache.recording.fields import CaptureFields, split_fields
from flexcache.recording.forward.capture_targets import CaptureTargets, find_targets, measure_arrays
from flexcache.recording.forward.decoder_inputs import infer_decoder_inputs
from flexcache.recording.forward.image_inputs import check_images, describe_patches, padding
from flexcache.recording.forward.objective import OBJECTIVE, Objective
from flexcache.recording.forward.transform import Transform
from flexcache.recording.make_completions import make_completions
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_identity import check_same, stored_identity
from flexcache.recording.planning.store_plan import BackgroundPlan
from flexcache.recording.recompute import check_rows
from flexcache.recording.run.cuda_transfer import transfer_for
from flexcache.recording.run.fingerprint import fingerprint, model_notices
from flexcache.recording.run.forward_loop import complete_store
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress
from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run_options import RunOptions
from flexcache.spec import CaptureSpec, listed
from flexcache.store.format.schema import read_attributes
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, parse_location
from flexcache.store.write.create import check_target


def capture(
    model: Any,
    tokenizer: Any,
    documents: Any,
    path: str | os.PathLike | StoreLocation,
    spec: CaptureSpec | None = None,
    *,
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    options: RunOptions | None = None,
    **fields: Unpack[CaptureFields],
) -> Store:
    """Run a model over documents and store the activations at its sites; resume a capture that was begun.

        flexcache.capture(model, tokenizer, documents, "run.zarr", sites=["resid_post"], layers="8:16")

    The model is left as it was: hooks are removed, and training mode is restored. The forward pass stops after the last
    site has fired, so later blocks and the lm_head are never computed.

    Any number of processes may make this call for one store at the same time, under a launcher or not, on one machine
    or on many that share a file system. One of them makes the plan, each computes units that no other computes, and all
    return when the store is complete. Units that a process leaves unfinished are computed by another. Processes that
    hold one model together (tensor parallel, FSDP, pipelines of transformers) make the call together; each writes the
    activations that it owns.

    With ``generate={"max_new_tokens": 64}`` the documents are prompts: the model completes them first, into files next
    to the store, see `flexcache.Generation`. With ``"capture": True`` in it, the activations of the generation are
    stored.

    Small forward passes first show whether padding changes the rows. If it does, batches hold sequences of one length
    only, or one sequence. A later capture of the same model at the same sites, in the same process, does not repeat
    them, unless the model has changed. A batch that does not fit into the memory of the device is halved.

    Parameters
    ----------
    model
        Any transformers model with token ids as input, or a vision transformer (blocks that read one token a patch), on
        any device. The rows of an encoder-decoder model are those of its decoder, for documents with a ``target``; pass
        ``model.get_encoder()`` for those of the encoder. In a pipeline of torch, pass the `PipelineStage` of this
        process, or a list of them; see `flexcache.parallel.stages`. A folder or a name on the hub is loaded, see
        `flexcache.ModelSource`.
    tokenizer
        The tokenizer of the model, or the image processor of a vision transformer; None for documents with ``tokens``.
        A folder or a name on the hub is loaded.
    documents
        Dicts ``{"id", "text" | "tokens" | "messages" | "image", any labels}``, a path, a table or a dataset; see
        `flexcache.open_documents`. A vision transformer reads the image of documents that have other inputs, too. For
        an encoder-decoder model, text or tokens are the input of the encoder, and ``target`` or ``target_tokens`` that
        of the decoder.
    path
        The store. If it was made from the same arguments, its missing units are captured.
    spec, options
        What is stored, see `flexcache.spec.CaptureSpec`; and how the capture runs, see
        `flexcache.recording.run_options.RunOptions`. Their fields can also be given one by one, as *fields*.
    transforms
        Functions of activations whose results are stored. With transforms, no site is captured by default.
    objective
        The scalar whose gradients are stored at sites that end in ``.grad``: `NextTokenLoss` by default,
        `LogitDifference` of two tokens, or a function of the model's output and the `Batch`; see
        `flexcache.recording.forward.objective.Objective`. Its value is stored as ``objective``.
    **fields
        Fields of *spec* and *options*, such as ``sites=["resid_post"]``, ``rows="last"`` or ``buffer_bytes="1 GiB"``.
        A resumed capture may have smaller *batch_tokens* than before.

    Returns
    -------
    Store, complete

    Raises
    ------
    SiteError
        The model does not have a site or layer, or its forward pass does not reach it.
    DocumentsError, ConfigError, PlanError
        Raised before anything is computed.
    RangeError
        A value is not finite or does not fit *dtype*. Committed units are kept.
    MismatchError
        The store at *path* was made from something else: documents, options, or a model that computes something
        else, by any of its values or by its output on a small fixed input; see docs/reliability.md.
    CaptureError
        The disk refused a write. Committed units are kept.
    """
    path = parse_location(path)
    check_target(path)
    call = CaptureCall("flexcache.capture", tokenizer, spec, transforms, objective, options, fields)
    model = model_of(model)
    with CaptureProgress(call.options.progress) as bars, prepare_capture(model, documents, path, call, bars) as ready:
        if ready.decoded is not None:
            ready.decoded.write_rows(ready.recorder, bars)
        else:
            complete_store(
                ready.model,
                ready.tokenizer,
                ready.targets,
                ready.recorder,
                bars,
                ready.group,
                unchanged=ready.unchanged,
            )
    return Store(path)


class CaptureCall:
    """The checked arguments of a capture, but for model, documents and path."""

    def __init__(
        self,
        where: str,
        tokenizer: Any,
        spec: CaptureSpec | None,
        transforms: Sequence[Transform],
        objective: Objective | None,
        options: RunOptions | None,
        fields: Mapping[str, Any],
    ) -> None:
        self.where, self.tokenizer, self.objective = where, tokenizer, objective
        self.spec, self.content, self.options = split_fields(fields, CaptureFields, spec, options, where)
        self.transforms = listed(transforms, Transform, "transforms")


@dataclass(frozen=True)
class ReadyCapture:
    """A planned store with the model that fills it: everything is checked, and nothing is computed yet."""

    model: Any
    tokenizer: Any
    targets: CaptureTargets
    recorder: Recorder
    group: ModelParallelGroup
    unchanged: Callable[[], None]
    decoded: DecodedCompletions | None = None


@contextmanager
def prepare_capture(
    model: Any,
    documents: Any,
    path: StoreLocation,
    call: CaptureCall,
    bars: CaptureProgress,
    *,
    grows: bool = True,
) -> Iterator[ReadyCapture]:
    """Check model and documents, and plan the store or compare it with them; the model is in evaluation mode.

    A large corpus is planned further by a thread until the context ends, unless *grows* is false.
    """
    options = call.options
    tokenizer = tokenizer_of(call.tokenizer, model)
    objective = objective_of(call.objective, tokenizer)
    spec = _resolved(call.spec, call.content | described(call.transforms, objective), model, tokenizer, call.where)
    spec.check()
    with evaluation_mode(model), closing(ModelParallelGroup(model)) as group, ExitStack() as stack:
        targets = find_targets(model, spec, call.transforms, objective, group.remote_modules())
        group.check_targets(targets)
        decoded = None
        if spec.generate is not None:
            documents, decoded = _completed(model, tokenizer, documents, path, spec, targets, group, options, bars)
            spec = spec.model_copy(update={"chat": None})  # completions are documents of tokens
        corpus = open_documents(documents, images_first=reads_images(model))
        tokenizer = model_input(model, tokenizer, corpus.content)
        example = check_images(model, spec, targets, tokenizer, group.processes)
        inputs = PlanInputs(
            documents=corpus,
            tokenizer=tokenizer,
            arrays=measure_arrays(model, spec, targets, group.read_example, example),
            spec=spec,
            model=group.describe_model(model, example) | (options.model_info or {}),
            tokenizer_identity=describe_tokenizer(tokenizer, corpus.content == "messages", spec.chat),
            vocabulary=vocabulary_size(model),
            encoder_vocabulary=encoder_vocabulary_size(model),
            positions=count_positions(model),
            notes={"user_hooks": hooks.user_hooks(model)} | describe_patches(tokenizer),
        ).match_store(path)
        pad = padding(model, tokenizer)
        passed = PassedChecks(model, inputs.model, targets, spec, pad, group.alone)
        if decoded is None:
            check = partial(hooks.check_sites, example=example, reader=group.read_example, alone=group.alone)
            passed.run_once("sites", partial(check, model, targets.points))
        if spec.isolated:
            check_isolation(model, targets, pad_token_id(model, tokenizer), group)
        find = partial(passed.run_once, "batching", partial(find_batching, model, targets, pad, spec, group))
        verdict = None if decoded is None else decoded.verdict
        if verdict is None and not (group.alone and has_batching(path)):
            verdict = find()
        if verdict is not None:
            notes = {**(inputs.notes or {}), **verdict.describe()}
            inputs = replace(inputs, batching=verdict.batching, notes=notes)
        planning = bars.planning(None)
        plan = BackgroundPlan(path, inputs, planning, planning.wait, grows=grows and group.alone and decoded is None)
        stack.enter_context(closing(plan)).begin()
        amount = plan.amount
        if plan.running:
            stack.callback(planning.done, amount is not None)
        else:
            planning.done(amount is not None)
        stored = stored_identity(read_attributes(path))
        changed = check_same(stored, inputs.identity(), path, allow_changed_model=options.allow_changed_model)
        for line in model_notices(stored["model"], inputs.model, changed):
            bars.say(line)
        for name, text in amount.lines() if amount else ():
            bars.say(f"  {name}: {text}")
        computed = fingerprint(model, group.sizes.tp) if decoded is None else decoded.fingerprint
        now = computed | ({"model": model_key(inputs.model)} if changed else {})
        recorder = Recorder(
            path,
            fingerprint=now,
            buffer_bytes=options.buffer_bytes,
            allow_mixed=options.allow_mixed,
            transfer=transfer_for(model),
            batch_tokens=spec.batch_tokens,
            keys=group.keys(targets.points, [(OBJECTIVE, None)] if OBJECTIVE in stored["arrays"] else ()),
            heartbeat_timeout=options.heartbeat_timeout,
        )
        recorder.follow_plan(plan.check)
        if not changed and decoded is None:
            check_rows(model, recorder.store, pad, group, now, most_tokens=recorder.batch_tokens)
        if (changed or recorder.store.provenance.batching is None) and recorder.pending():
            check_batching(recorder.store, verdict or find())
        if said := batching_notice(recorder.store):
            bars.say(said)
        unchanged = partial(group.check_unchanged, model, inputs.model, str(path), example)
        yield ReadyCapture(model, tokenizer, targets, recorder, group, unchanged, decoded)


def _completed(
    model: Any,
    tokenizer: Any,
    documents: Any,
    path: StoreLocation,
    spec: CaptureSpec,
    targets: CaptureTargets,
    group: ModelParallelGroup,
    options: RunOptions,
    bars: CaptureProgress,
) -> tuple[Documents, DecodedCompletions | None]:
    """Return the documents with completions, and their activations if the spec asks for those of the generation."""
    assert spec.generate is not None
    corpus = open_documents(documents)
    if not spec.decoding:
        completions, advance = Completions.of_store(path), bars.generating(corpus.count)
        make_completions(
            *(model, tokenizer, corpus, completions, spec.generate, advance, options.heartbeat_timeout),
            chat=spec.chat,
            special_tokens=spec.special_tokens,
        )
        return completions.open(), None
    decoded = capture_completions(model, tokenizer, corpus, path, spec, targets, group, options.heartbeat_timeout, bars)
    return decoded.documents, decoded


def _resolved(spec: CaptureSpec, fields: dict[str, Any], model: Any, tokenizer: Any, where: str) -> CaptureSpec:
    """Return a spec with *fields*, and with what follows from the model: its longest input, and decoder inputs."""
    if lost := sorted({*spec.transforms} - {*fields["transforms"]}):
        raise ConfigError(
            f"the function of transform {lost[0]!r} is missing",
            where=where,
            remedy="a spec describes transforms; pass their functions as transforms=[…] too",
        )
    spec = spec.with_fields(fields, where)
    decoder = infer_decoder_inputs(model, spec.decoder_inputs)
    return spec.within(longest_input(model, tokenizer)).model_copy(update={"decoder": decoder})
