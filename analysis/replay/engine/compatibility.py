"""Compare a store with the model that is to replay it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import nn

from analysis.replay.engine.partial_loading import PartialLoad, partial_load
from flexcache.errors import AnalysisError, MismatchError, nearest
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.identity import differences, get_identity, has_weight_digests
from flexcache.identity.describe import describe_model
from flexcache.identity.structure import describe_structure
from flexcache.identity.weights import combine_digests, digest_tensors
from flexcache.images.input import stored_image_input
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.recompute import check_rows
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.site import READ_ONLY
from flexcache.store.format.model_record import OTHERS
from flexcache.store.format.provenance import recorded_model
from flexcache.store.read.store import Store

NAMES = ("rows", "site", "units", "weights", "behavior", "attention", "int8")
REQUIRED = ("rows", "site", "units")
"""Reasons that cannot be accepted: a replay needs these rows to start from."""
NO_CONDITION = ("flexcache-activations", "attention", "compute_dtype")
"""Entries of a fingerprint that are compared elsewhere."""


def find_incompatibilities(store: Store, model: nn.Module, processor: Any = None) -> dict[str, str]:
    """Return the reasons why a store cannot be replayed with a model, by short name; empty if it can.

    ``weights``: another class, configuration or weights than those of the capture. ``behavior``: a model with the same
    weights that computes something else on a small fixed input, because a hook steers it, an adapter is off or an
    activation function was replaced, for example. ``attention``: another attention kernel. A model whose skipped blocks
    were not loaded is compared by the files of its checkpoint, see `analysis.replay.load_rest`. ::

        replay.find_incompatibilities(store, model)  # {"attention": "attention was sdpa, and is eager now"}

    Parameters
    ----------
    processor
        As for `analysis.replay.Engine`.
    """
    found = dict(store.replayable.reasons)
    if "weights" not in found:
        found |= _compare_model(store, model, processor)
    attention = {one.get("attention") for record in store.ledger for one in unit_conditions(record.fingerprint)}
    now = fingerprint(model)["attention"]
    if attention and attention != {now}:
        found["attention"] = f"attention was {', '.join(map(str, sorted(map(str, attention))))}, and is {now} now"
    return found


def unit_conditions(fingerprint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the conditions of a unit: several if it was merged from units of different conditions."""
    merged = fingerprint.get("merged")
    return list(merged) if isinstance(merged, list) else [fingerprint]


def check_compatible(store: Store, model: nn.Module, accept: Collection[str] = (), processor: Any = None) -> list[str]:
    """Return notes on the incompatibilities that were accepted by name, if there are no others.

    Raises
    ------
    MismatchError
        There is another incompatibility.
    AnalysisError
        *accept* holds an unknown name, or one that cannot be accepted.
    """
    for name in accept:
        if name not in NAMES or name in REQUIRED:
            allowed = tuple(name for name in NAMES if name not in REQUIRED)
            raise AnalysisError(f"{name!r} cannot be accepted", remedy=nearest(name, allowed))
    found = find_incompatibilities(store, model, processor)
    rejected = {name: text for name, text in found.items() if name not in accept}
    if rejected:
        acceptable = [name for name in rejected if name not in REQUIRED]
        raise MismatchError(
            "the store cannot be replayed with this model",
            where=str(store.path),
            expected="a row for every token, and the model and attention of the capture",
            found="; ".join(rejected.values()),
            remedy=f"accept={acceptable} replays it all the same, and the results say so"
            if len(acceptable) == len(rejected)
            else "capture resid_post with rows: all",
        )
    notes = [f"Accepted: {text}." for text in found.values()]
    if "weights" not in found and get_identity(store.provenance.model_record) is None:
        notes.append("The store was written by an earlier version: only a sample of the weights was compared.")
    return notes


def inexactness_notes(store: Store, model: nn.Module, dtype: str) -> list[str]:
    """Return why bits may differ from the capture's; nothing if a replay is exact.

    Parameters
    ----------
    dtype
        Storage dtype of the array that the replay starts from.
    """
    now, notes = fingerprint(model), []
    if dtype != now["compute_dtype"]:
        notes.append(f"Stored in {dtype}, computed in {now['compute_dtype']}: a replay is exact only to the rounding.")
    earlier = next((record.fingerprint for record in store.ledger), {})
    changed = [
        f"{name} {earlier[name]}, now {now.get(name)}"
        for name in sorted(earlier)
        if name not in NO_CONDITION and earlier[name] != now.get(name)
    ]
    if changed:
        notes.append("Captured under other conditions, which may change bits: " + "; ".join(changed) + ".")
    return notes


def _compare_model(store: Store, model: nn.Module, processor: Any) -> dict[str, str]:
    before = recorded_model(store)
    partial = partial_load(model)
    if partial is not None:
        return _compare_partial(store.provenance.model_record, model, partial)
    if not has_weight_digests(before):
        return {}
    recorded, where = store.provenance.tokenizer, str(store.path)
    images = stored_image_input(recorded, model, processor, where=where) if store.images else None
    inputs = padding(model, images)
    now = fingerprint(model)
    given = describe_model(model, now, example=None if isinstance(inputs, int) else inputs.example(model))
    found = differences(before, given)
    intro = f"the model is not that of the capture, a {before.get('class')}: "
    if found:
        held = any(line.startswith(("weights", "class", "config", OTHERS)) for line in found)
        return {"weights" if held else "behavior": intro + "; ".join(found)}
    with evaluation_mode(model), closing(ModelParallelGroup(model)) as group:
        try:
            check_rows(model, store, inputs, group, now)
        except MismatchError as error:
            return {"behavior": intro + str(error.found)}
    return {}


def _compare_partial(before: Mapping[str, Any], model: nn.Module, partial: PartialLoad) -> dict[str, str]:
    """Compare a partly loaded model: the files of its checkpoint, the weights that were loaded, and hooks."""
    if partial.files != before.get("files"):
        return {"weights": "the checkpoint's files are not those of the capture"}
    if combine_digests(digest_tensors(model).weights) != partial.weights:
        return {"weights": "the weights were changed after they were loaded"}
    hooks = describe_structure(model)["hooks"]
    held = (get_identity(before) or {}).get("structure", {}).get("hooks", [])
    return {} if hooks == held else {"behavior": f"hooks: {held or 'none'} before, {hooks or 'none'} now"}


def check_no_images(store: Store) -> None:
    """Raise AnalysisError if the documents are images: their models predict no next tokens."""
    if store.images:
        raise AnalysisError(
            "edits are measured by the logits of next tokens, but the documents are images",
            where=str(store.path),
            expected="a store of texts or tokens",
            remedy="run edits with analysis.replay.Engine, or attribution with an objective of your own",
        )


def has_unloaded_weights(module: nn.Module) -> bool:
    """Return True if a module has weights that were not loaded."""
    return any(parameter.device == torch.device("meta") for parameter in module.parameters())


def check_editable(point: HookPoint) -> None:
    """Raise AnalysisError if a path of the model bypasses the site: an edit would have a partial effect, or none."""
    if point.array in READ_ONLY or point.of_experts:
        raise AnalysisError(
            f"{point.array} can be read but not edited",
            where=str(point),
            expected="a site that everything after it goes through",
            remedy="edit resid_pre, attn_out or mlp_out instead",
        )


def check_store_and_model(store: Any, model: Any) -> None:
    """Raise AnalysisError if *store* is not an opened store, or *model* not a PyTorch module."""
    if isinstance(store, nn.Module) and isinstance(model, Store | str):
        raise AnalysisError(
            "store and model are swapped",
            expected="the store first, then the model",
            found=f"{type(store).__name__}, {type(model).__name__}",
        )
    if not isinstance(store, Store):
        raise AnalysisError(
            "a replay needs a store",
            expected="a store, or its path",
            found=type(store).__name__,
            remedy='open one: flexcache.open("run.zarr")',
        )
    if not isinstance(model, nn.Module):
        raise AnalysisError(
            "a replay needs a loaded model",
            expected="a torch.nn.Module",
            found=short_repr(model),
            remedy='load it: flexcache.ModelSource(name="…").load()',
        )


def short_repr(value: Any) -> str:
    """Return a value for an error message, on one line of at most 80 characters."""
    text = type(value).__name__ if isinstance(value, nn.Module) else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"
