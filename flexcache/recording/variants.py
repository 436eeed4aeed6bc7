"""Capture several variants of a model, such as a base model and its adapters, into stores with the same rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch

from flexcache.documents import open_documents
from flexcache.errors import CaptureError, ConfigError, SiteError
from flexcache.hooks import find_blocks
from flexcache.hooks.checks.shared_blocks import count_shared_blocks
from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
from flexcache.hooks.locate.vision import reads_images
from flexcache.hooks.read.measure import example_inputs
from flexcache.model import ModelSource
from flexcache.model.adapters import check_variant_names
from flexcache.paths import shown
from flexcache.recording.arguments import model_of
from flexcache.recording.capture import CaptureCall, ReadyCapture, prepare_capture
from flexcache.recording.fields import CaptureFields
from flexcache.recording.forward.batch import Batch, Padding, unplanned_batch
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.forward.objective import Objective
from flexcache.recording.forward.transform import Transform
from flexcache.recording.run.batch_forward import FAILURES, Sink
from flexcache.recording.run.forward_loop import complete_store
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress
from flexcache.recording.run.variants import Variant, VariantRecorders, open_variants
from flexcache.recording.run_options import RunOptions
from flexcache.spec import CaptureSpec
from flexcache.store.format.schema import SEQUENCES
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, parse_location
from flexcache.store.write.create import check_target

TRIAL = (7, 5)
"""Tokens of the sequences on which shared blocks are tried."""


def capture_variants(
    models: Mapping[str, Any] | ModelSource,
    tokenizer: Any,
    documents: Any,
    folder: str | os.PathLike | StoreLocation,
    spec: CaptureSpec | None = None,
    *,
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    options: RunOptions | None = None,
    **fields: Unpack[CaptureFields],
) -> dict[str, Store]:
    """Run variants of one model over the same documents, into stores whose rows are the same tokens.

        source = flexcache.ModelSource(name="my/base", adapters={"base": None, "french": "runs/french"})
        stores = flexcache.capture_variants(source, tokenizer, documents, "runs", sites=["resid_post"])
        stores["base"], stores["french"]                    # runs/base.zarr, runs/french.zarr

    Each store is the one that `flexcache.capture` makes of that variant alone, byte for byte: it can be resumed,
    extended, verified and replayed by itself. The variants run one after the other on each batch; blocks that a variant
    shares with the first one, from the bottom up, run once for both. Blocks are shared if all of their tensors and
    settings are equal, and those of everything that runs before them, which is then tried on a small batch. Gradients,
    images, encoder-decoder models, and models of another configuration share none.

    Like a capture, it may be run by many processes at once, and is resumed by the same call.

    Parameters
    ----------
    models
        Models by name: loaded ones, or sources, folders and names to load; or a `ModelSource` with *adapters*, whose
        variants share the memory of the base model. Each is on one process.
    folder
        Where the stores are made: ``NAME.zarr`` for each model.

    The other parameters are those of `flexcache.capture`. *buffer_bytes* is divided among the stores.

    Returns
    -------
    dict
        The complete stores, by name.

    Raises
    ------
    CaptureError
        The stores of two variants would have other rows or batches.
    ConfigError, MismatchError
        And all other errors of `flexcache.capture`.
    """
    call = CaptureCall("flexcache.capture_variants", tokenizer, spec, transforms, objective, options, fields)
    folder = parse_location(folder)
    if call.content.get("generate", call.spec.generate) is not None:
        raise ConfigError(
            "variants read the same tokens, and each would generate its own",
            where="generate",
            remedy="make completions with one of them by flexcache.generate, and give the files as documents",
        )
    names = list(models.variants() if isinstance(models, ModelSource) else models)
    check_variant_names(names)
    paths = [folder / f"{name}.zarr" for name in names]
    for path in paths:
        check_target(path)
    given = models.load_variants() if isinstance(models, ModelSource) else models
    loaded = [model_of(given[name]) for name in names]
    _check_apart(dict(zip(names, loaded, strict=True)))
    call.options = call.options.model_copy(update={"buffer_bytes": call.options.buffer_bytes // len(names)})
    corpus = open_documents(
        list(documents) if isinstance(documents, Iterator) else documents, images_first=reads_images(loaded[0])
    )
    with CaptureProgress(call.options.progress) as bars, ExitStack() as stack:
        ready = [
            stack.enter_context(prepare_capture(model, corpus, path, call, bars, grows=False))
            for model, path in zip(loaded, paths, strict=True)
        ]
        _check_same_plans(ready)
        variants = _variants(names, ready, bars)
        recorders: Any = VariantRecorders([one.recorder for one in ready])
        first = ready[0]

        def opener(
            model: Any, targets: Any, pad: Padding, sink: Sink, group: ModelParallelGroup
        ) -> AbstractContextManager[Callable[[Batch | None], None]]:
            return open_variants(variants, recorders, pad, sink, group)

        def unchanged() -> None:
            for number in recorders.working:
                ready[number].unchanged()

        complete_store(
            first.model, first.tokenizer, first.targets, recorders, bars, first.group, folder, unchanged, opener
        )
    return {name: Store(path) for name, path in zip(names, paths, strict=True)}


def _check_apart(models: Mapping[str, torch.nn.Module]) -> None:
    """Raise ConfigError if two variants hold the same module: it cannot be both with and without an adapter."""
    owners: dict[int, str] = {}
    for name, model in models.items():
        inside = {id(module) for module in model.modules() if module._parameters}
        if shared := [owners[one] for one in inside if one in owners]:
            raise ConfigError(
                f"variants {shared[0]} and {name} are one model: PEFT puts an adapter into the modules of its base",
                where="flexcache.capture_variants",
                expected="models that share no modules; they may share tensors",
                remedy="load each: models=flexcache.ModelSource(name=…, adapters={…}), or load the base twice",
            )
        owners |= dict.fromkeys(inside, name)


def _check_same_plans(ready: Sequence[ReadyCapture]) -> None:
    """Raise CaptureError unless the stores have the same batches and rows, and each model is on one process."""
    first = ready[0].recorder.store
    for one in ready:
        store = one.recorder.store
        if not one.group.alone:
            raise CaptureError(
                "variants are captured only from models that one process holds",
                where=shown(store.path),
                remedy="capture each with flexcache.capture: the rows are the same",
            )
        if (store.path / SEQUENCES).read_bytes() != (first.path / SEQUENCES).read_bytes():
            raise CaptureError(
                "the stores of two variants have other batches or rows",
                where=f"{shown(first.path)} and {shown(store.path)}",
                found=f"batches: {first.provenance.batching} and {store.provenance.batching}",
                remedy="capture each with flexcache.capture",
            )


def _variants(names: Sequence[str], ready: Sequence[ReadyCapture], bars: CaptureProgress) -> list[Variant]:
    """Return the variants, with the blocks that each shares with the first one, as is proved by a small forward."""
    first = ready[0]
    separate = first.targets.objective is not None or reads_images(first.model) or is_encoder_decoder(first.model)
    depth = 0 if separate else _depth(first.model)
    variants = [Variant(first.model, first.targets, depth)]
    for name, one in zip(names[1:], ready[1:], strict=True):
        shared = count_shared_blocks(first.model, one.model) if depth else 0
        variant = Variant(one.model, one.targets, shared)
        if shared and not _same_values([variants[0], variant], first):
            variant = Variant(one.model, one.targets, 0)
            bars.say(f"{name} shares no blocks: from the middle it runs differently than from the beginning")
        elif shared:
            bars.say(f"{name} shares {shared} of {depth} blocks with {names[0]}")
        variants.append(variant)
    return variants


def _depth(model: torch.nn.Module) -> int:
    try:
        return len(find_blocks(model)[1])
    except SiteError:
        return 0


def _same_values(variants: list[Variant], ready: ReadyCapture) -> bool:
    """Return True if the second variant computes the same bits after the blocks that it shares as by itself."""
    first, second = variants
    try:
        one, other = (_read_second([first, replace(second, shared=shared)], ready) for shared in (second.shared, 0))
    except FAILURES:
        return False
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def _read_second(variants: list[Variant], ready: ReadyCapture) -> dict[Any, torch.Tensor]:
    """Return what the second of two variants would store of a small batch."""
    ids = example_inputs(ready.model, shape=(len(TRIAL), max(TRIAL)))["input_ids"].cpu().numpy().astype(np.int32)
    batch = unplanned_batch([line[:count] for line, count in zip(ids, TRIAL, strict=True)])
    recorders, pad = VariantRecorders([ready.recorder] * 2), padding(ready.model, ready.tokenizer)
    found: dict[Any, torch.Tensor] = {}

    def keep(_: Batch, array: str, layer: int | None, values: torch.Tensor) -> None:
        if 1 in recorders.receivers:
            found[array, layer] = values.to("cpu", copy=True)

    with open_variants(variants, recorders, pad, keep, ready.group) as forward:
        forward(batch)
    return found
