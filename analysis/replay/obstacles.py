"""What stands between a store and an exact replay with a model at hand."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from flexcache.errors import AnalysisError, MismatchError, nearest
from flexcache.hooks.tap import Tap
from flexcache.model import describe_model
from flexcache.recorder.fingerprint import fingerprint
from flexcache.site import INEFFECTIVE
from flexcache.store.store import Store

NAMES = ("rows", "site", "units", "weights", "attention")
REFUSED = ("rows", "site", "units")
"""Without these there is nothing to go on from."""
EXACT_ASIDE = ("flexcache-activations", "attention", "compute_dtype")


def obstacles(store: Store, model: nn.Module) -> dict[str, str]:
    """Return what stands in the way of a replay, by short name: that of the store, other weights, other attention.

    Of a model whose skipped blocks were not loaded, the weights are those of its checkpoint, see
    `analysis.replay.load_rest`.
    """
    found = dict(store.replayable.reasons)
    known = store.provenance.get("model", {})
    if "weights" not in found:
        found |= _weights(known, model)
    attention = {record.fingerprint.get("attention") for record in store.ledger}
    now = fingerprint(model)["attention"]
    if attention and attention != {now}:
        found["attention"] = f"attention was {', '.join(map(str, sorted(map(str, attention))))}, and is {now} now"
    return found


def admit(store: Store, model: nn.Module, accept: Collection[str] = ()) -> list[str]:
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
    found = obstacles(store, model)
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
    return [f"Accepted: {text}." for text in found.values()]


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


def _weights(known: dict[str, str], model: nn.Module) -> dict[str, str]:
    files = getattr(model, "replayed_checkpoint", None)
    if files is not None:
        return {} if files == known.get("files") else {"weights": "the checkpoint's files are not those of the capture"}
    now = describe_model(model)
    if now["weights_sample_xxh3_128"] != known.get("weights_sample_xxh3_128"):
        return {"weights": f"the weights are not those of the capture, by a {known.get('class')}"}
    return {}


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


def refuse_half(tap: Tap) -> None:
    """Refuse an edit at a site where the model goes on with what it has beside it as well.

    Raises
    ------
    AnalysisError
    """
    if tap.array in INEFFECTIVE:
        raise AnalysisError(
            f"{tap.array} can be read and not edited",
            where=str(tap),
            expected="a site that everything after it goes through",
            remedy="edit resid_pre, attn_out or mlp_out instead",
        )
