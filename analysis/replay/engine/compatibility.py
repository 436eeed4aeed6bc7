"""What stands between a store and an exact replay with a model at hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import nn

from flexcache.errors import AnalysisError, MismatchError, nearest
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.identity import differences, identity_of, known, model_record
from flexcache.identity.describe import describe_model
from flexcache.identity.record import OTHERS
from flexcache.identity.structure import structure
from flexcache.identity.weights import combine, digest_tensors
from flexcache.images.input import stored_image_input
from flexcache.model import evaluating
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.recompute import check_rows
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.site import INEFFECTIVE
from flexcache.store.read.recorded_model import recorded_model
from flexcache.store.read.store import Store

NAMES = ("rows", "site", "units", "weights", "behavior", "attention")
REFUSED = ("rows", "site", "units")
"""Without these there is nothing to go on from."""
EXACT_ASIDE = ("flexcache-activations", "attention", "compute_dtype")


def obstacles(store: Store, model: nn.Module, processor: Any = None) -> dict[str, str]:
    """Return what stands in the way of a replay, by short name.

    ``weights`` stands for another class, configuration or weights than those of the capture; ``behavior`` for a model
    with the same weights that computes something else on a small fixed input, for example since a hook steers it, an
    adapter is off or an activation function was replaced; ``attention`` for another attention kernel. A model whose
    skipped blocks were not loaded is compared by the files of its checkpoint, see `analysis.replay.load_rest`.

    Parameters
    ----------
    processor
        As for `analysis.replay.Engine`.
    """
    found = dict(store.replayable.reasons)
    if "weights" not in found:
        found |= _model(store, model, processor)
    attention = {one.get("attention") for record in store.ledger for one in conditions_of(record.fingerprint)}
    now = fingerprint(model)["attention"]
    if attention and attention != {now}:
        found["attention"] = f"attention was {', '.join(map(str, sorted(map(str, attention))))}, and is {now} now"
    return found


def conditions_of(fingerprint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the conditions of a unit: several where it was merged from units of different ones."""
    merged = fingerprint.get("merged")
    return list(merged) if isinstance(merged, list) else [fingerprint]


def admit(store: Store, model: nn.Module, accept: Collection[str] = (), processor: Any = None) -> list[str]:
    """Return notes on what was accepted by name, if nothing else stands in the way.

    Raises
    ------
    MismatchError
        Something does.
    AnalysisError
        *accept* names what there is not, or what cannot be accepted.
    """
    for name in accept:
        if name not in NAMES or name in REFUSED:
            allowed = tuple(name for name in NAMES if name not in REFUSED)
            raise AnalysisError(f"{name!r} cannot be accepted", remedy=nearest(name, allowed))
    found = obstacles(store, model, processor)
    open_ones = {name: text for name, text in found.items() if name not in accept}
    if open_ones:
        free = [name for name in open_ones if name not in REFUSED]
        raise MismatchError(
            "the store cannot be replayed with this model",
            where=str(store.path),
            expected="a row for every token, and the model and attention that filled it",
            found="; ".join(open_ones.values()),
            remedy=f"accept={free} goes on all the same, and the results say so"
            if len(free) == len(open_ones)
            else "capture resid_post with rows: all",
        )
    notes = [f"Accepted: {text}." for text in found.values()]
    if "weights" not in found and identity_of(model_record(store.provenance)) is None:
        notes.append("The store is of an earlier version: its model was compared by a sample of the weights only.")
    return notes


def conditions(store: Store, model: nn.Module, dtype: str) -> list[str]:
    """Return why bits may differ from the capture's: none where a replay is exact.

    Parameters
    ----------
    dtype
        That of the array the replay reads.
    """
    now, notes = fingerprint(model), []
    if dtype != now["compute_dtype"]:
        notes.append(f"Stored in {dtype}, computed in {now['compute_dtype']}: a replay is exact only to the rounding.")
    earlier = next((record.fingerprint for record in store.ledger), {})
    changed = [
        f"{name} {earlier[name]}, now {now.get(name)}"
        for name in sorted(earlier)
        if name not in EXACT_ASIDE and earlier[name] != now.get(name)
    ]
    if changed:
        notes.append("Captured under other conditions, which may change bits: " + "; ".join(changed) + ".")
    return notes


def _model(store: Store, model: nn.Module, processor: Any) -> dict[str, str]:
    before = recorded_model(store)
    files = getattr(model, "replayed_checkpoint", None)
    if files is not None:
        return _rest(model_record(store.provenance), model, files)
    if not known(before):
        return {}
    reads = _reads_of(store, model, processor)
    now = fingerprint(model)
    given = describe_model(model, now, example=None if isinstance(reads, int) else reads.example(model))
    found = differences(before, given)
    kind = f"the model is not that of the capture, a {before.get('class')}: "
    if found:
        held = any(line.startswith(("weights", "class", "config", OTHERS)) for line in found)
        return {"weights" if held else "behavior": kind + "; ".join(found)}
    with evaluating(model), closing(ModelParallelGroup(model)) as group:
        try:
            check_rows(model, store, reads, group, now)
        except MismatchError as error:
            return {"behavior": kind + str(error.found)}
    return {}


def _rest(before: Mapping[str, Any], model: nn.Module, files: Any) -> dict[str, str]:
    """Compare a model whose skipped blocks were not loaded: its checkpoint, what was loaded of it, and hooks."""
    if files != before.get("files"):
        return {"weights": "the checkpoint's files are not those of the capture"}
    if combine(digest_tensors(model).weights) != getattr(model, "replayed_weights", None):
        return {"weights": "the weights were changed after they were loaded"}
    hooks = structure(model)["hooks"]
    held = (identity_of(before) or {}).get("structure", {}).get("hooks", [])
    return {} if hooks == held else {"behavior": f"hooks: {held or 'none'} before, {hooks or 'none'} now"}


def _reads_of(store: Store, model: nn.Module, processor: Any) -> Any:
    """Return the token id for padding, or how the model reads images."""
    return padding(model, stored_image_input(store, model, processor) if store.images else None)


def refuse_images(store: Store) -> None:
    """Refuse a question about next tokens, where the documents are images.

    Raises
    ------
    AnalysisError
    """
    if store.images:
        raise AnalysisError(
            "edits are judged by the logits of next tokens, and the documents are images",
            where=str(store.path),
            expected="a store of texts or tokens",
            remedy="run edits by analysis.replay.Engine, or attribution with an objective of your own",
        )


def on_meta(module: nn.Module) -> bool:
    """Whether a module has weights that were not loaded."""
    return any(parameter.device == torch.device("meta") for parameter in module.parameters())


def refuse_half(point: HookPoint) -> None:
    """Refuse an edit at a site where the model goes on with what it has beside it as well.

    Raises
    ------
    AnalysisError
    """
    if point.array in INEFFECTIVE:
        raise AnalysisError(
            f"{point.array} can be read and not edited",
            where=str(point),
            expected="a site that everything after it goes through",
            remedy="edit resid_pre, attn_out or mlp_out instead",
        )


def check_store_and_model(store: Any, model: Any) -> None:
    """Raise AnalysisError if *store* is no opened store, or *model* no PyTorch module."""
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
            found=shown(model),
            remedy='load it: flexcache.ModelSource(name="…").load()',
        )


def shown(value: Any) -> str:
    """Return a value for an error message, on one line of at most 80 characters."""
    text = type(value).__name__ if isinstance(value, nn.Module) else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"
