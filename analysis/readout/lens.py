"""Logit lens: predictions after each layer, from stored residuals, the final norm and the unembedding.

Needs torch, because the norm is that of the model; nothing else of the model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
from analysis.readout.head import Head as Head
from analysis.readout.predictions import predict_rows
from analysis.statistics.kept_rows import Rows
from analysis.statistics.onepass import DocumentSample, read
from flexcache.errors import AnalysisError
from flexcache.paths import local_path
from flexcache.site import Layers
from flexcache.store.format.model_record import adapters_text, get_identity
from flexcache.store.read.store import Store

ROWS = 1024
LEAST_ROWS = 64
OPERATIONS = 3e12
"""Floating-point operations of the products by default: about half a minute on two cores."""


@accept_store_path
def compute(
    store: Store,
    head: Any = None,
    *,
    site: str = "resid_post",
    rows: int | None = None,
    seed: int = 0,
    layers: Layers = "all",
    **where: Any,
) -> xr.Dataset:
    """Return the predictions after each layer (nostalgebraist 2020), compared with those of the model.

    ::

        found = lens.compute(store, "path/to/model", rows=2048)
        found["agreement"], found["loss"], found.attrs["reference"]

    Parameters
    ----------
    head
        A `Head`, a checkpoint folder, or a loaded model; by default the folder of the model of the store. A loaded
        model also runs the sampled documents, so that layers are compared with its own logits.
    rows
        Approximate number of rows, whole documents of a seeded sample. By default 1,024, of which fewer, evenly spaced,
        are used if a large vocabulary would take more than about half a minute on two cores.
    layers
        Layers to read.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset
        See `of_rows`.

    Raises
    ------
    AnalysisError
        *head* is none of these; no head is found; its hidden size does not fit the site; or the rows of the store are
        means of documents.
    """
    head, model = chosen_head(store, head, site)
    wanted = ROWS if rows is None else rows
    statistic = Rows(wanted, DocumentSample.of_rows(wanted, store.n_rows, seed))
    found = read(store, site, {"rows": statistic}, layers=layers, **where)
    values = {int(layer or 0): found.states[layer]["rows"]["values"] for layer in found.layers}
    chosen = found.states[found.layers[0]]["rows"]["row"]
    most = rows or affordable_rows(head, len(values))
    show = {name: where[name] for name in ("workers", "progress") if name in where}
    return of_rows(store, head, values, chosen, site=site, model=model, most=most, **show)


def affordable_rows(head: Head, layers: int) -> int:
    """Return how many rows the products of `OPERATIONS` allow, at least `LEAST_ROWS`, at most `ROWS`.

    >>> import torch
    >>> affordable_rows(Head(torch.nn.Identity(), torch.empty(262_144, 640, device="meta")), layers=18)
    496
    """
    return int(np.clip(OPERATIONS / (2 * head.weight.numel() * layers), LEAST_ROWS, ROWS))


def chosen_head(store: Store, head: Any, site: str) -> tuple[Head, Any]:
    """Return the head to use, and the model if a loaded one was given.

    Raises
    ------
    AnalysisError
        There is no head, or it does not fit the site.
    """
    if store.spec.rows == "mean":
        raise AnalysisError("means of documents predict no token", where=str(store.path), expected="rows of tokens")
    model = head if hasattr(head, "get_output_embeddings") and hasattr(head, "config") else None
    if model is not None:
        head = Head.of(model)
    if head is not None and not isinstance(head, Head | str | bytes | os.PathLike):
        raise AnalysisError(
            "a logit lens cannot use this as a head",
            expected="a lens.Head, a loaded causal language model, or the path of a checkpoint folder",
            found=type(head).__name__,
            remedy="write lens.Head(norm=…, weight=…) for another kind of model",
        )
    if not isinstance(head, Head):
        if head is None and adapters_text(store.provenance.model) != "":
            raise AnalysisError(
                "the model of the store has an adapter, which may change its final norm or unembedding",
                where=str(store.path),
                found=adapters_text(store.provenance.model),
                remedy="give the folder of the adapter as model=, or lens.Head.of(model)",
            )
        place = local_path(head or store.provenance.model_name or ".")
        if not place.is_dir():
            raise AnalysisError(
                "the model's final norm and unembedding are needed",
                where=str(place),
                expected="the checkpoint folder",
                found="no folder",
                remedy="give the folder as model=, or lens.Head.of(model)",
            )
        head = Head.load(place)
    if site not in store.arrays or head.weight.shape[1] != store.arrays[site].features:
        raise AnalysisError(
            "the head does not fit the site",
            where=site,
            expected=f"{head.weight.shape[1]} features",
            found=str(store.arrays[site].features if site in store.arrays else "no such site"),
        )
    return head, model


def _has_other_weights(store: Store, model: Any) -> bool:
    """Return True if a model of the recorded class has other weights than the store recorded."""
    record = store.provenance.model_record
    before = get_identity(record)
    if before is None or record.get("class") != type(model).__name__:
        return False
    return bool(before["weights"] != _digest_weights(model))


def _digest_weights(model: Any) -> str:
    from flexcache.identity.weights import combine_digests, digest_tensors

    return combine_digests(digest_tensors(model).weights)


def identity(head: Head, model: Any = None) -> dict[str, Any]:
    """Return what a lens depends on: the values of the head, those of the model if it runs, and torch."""
    found = {"head": head.identity(), "torch": version("torch")}
    if model is not None:
        found["model"] = _digest_weights(model)
    return found


def of_rows(
    store: Store,
    head: Head,
    values: Mapping[int, np.ndarray],
    rows: np.ndarray,
    *,
    site: str = "resid_post",
    model: Any = None,
    most: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Return the logit lens of given rows of several layers.

    ::

        values = {layer: store.read("resid_post", layer, rows) for layer in (0, 12, 29)}
        lens.of_rows(store, head, values, rows)["kl_mean"]

    ``kl`` (layer, row): KL divergence of the layer's prediction from the reference in nats, Σ p_reference
    (log p_reference − log p_layer), never negative. ``entropy`` (layer, row), in nats. ``rank`` (layer, row):
    number of tokens that are more probable than the next token of the document; ``log_probability`` (layer, row) of
    that token; -1 and NaN at the end of a document. ``agrees`` (layer, row): True if the most probable token is that
    of the reference. Over rows without first tokens: ``kl_mean``, ``entropy_mean``, ``agreement``, ``rank_median``,
    ``loss`` (layer). Logits are float32; sums are float64.

    The reference is the prediction of the model, given by *model*'s own logits, or by the lens at the model's last
    layer, where ``kl`` is then 0 by definition. If the store lacks that layer, ``kl`` and ``agreement`` are NaN and
    there is no ``agrees``. ``attrs`` hold the ``reference`` in words, ``n``, the number of rows in the means,
    and ``sample``, a description of the rows.

    Parameters
    ----------
    values
        Activations of *site* by layer, each of shape (rows, features).
    rows
        Row numbers, ascending.
    model
        A loaded model that runs the documents of the rows.
    most
        Largest number of rows; of more, evenly spaced ones are used.
    workers
        Number of threads; one for each core by default.
    """
    chosen = np.arange(len(rows))
    if most is not None and most < len(rows):
        chosen = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(np.int64))
    given, rows = len(rows), rows[chosen]
    layers = sorted(values)
    stack = [values[layer][chosen] for layer in layers]
    target, position = next_tokens(store, rows)
    last = (store.arrays["resid_post"].depth or 0) - 1 if "resid_post" in store.arrays else -1
    own_logits = None
    if model is not None:
        from analysis.readout.own_logits import OwnLogits

        said, reference, own_logits = "the model's own logits", len(stack), OwnLogits(model, store)
        if _has_other_weights(store, model):
            said += ", whose weights are not those of the capture"
    elif last >= 0 and last in store.arrays["resid_post"].slices:
        said, reference = f"layer {last}, the model's last", layers.index(last) if last in layers else len(stack)
        if site != "resid_post" or last not in layers:
            reference = len(stack)
            stack.append(store.read("resid_post", last, rows))
    else:
        said, reference = "missing: the store does not have resid_post of the model's last layer", None
    found = predict_rows(head, stack, rows, target, reference, own_logits, workers, progress)
    agrees = None if reference is None else found["best"][: len(layers)] == found["best"][reference]
    data = {name: found[name][: len(layers)] for name in ("kl", "entropy", "log_probability", "rank")}
    inner = position > 0 if (position > 0).any() else np.ones(len(rows), bool)
    scored = inner & (target >= 0)
    undefined = np.full(len(layers), np.nan)
    many, dims = scored.any(), ("layer", "row")
    return xr.Dataset(
        {
            **{name: (dims, numbers) for name, numbers in data.items()},
            **({} if agrees is None else {"agrees": (dims, agrees)}),
            "kl_mean": ("layer", data["kl"][:, inner].mean(1)),
            "entropy_mean": ("layer", data["entropy"][:, inner].mean(1)),
            "agreement": ("layer", undefined if agrees is None else agrees[:, inner].mean(1)),
            "rank_median": ("layer", np.median(data["rank"][:, scored], axis=1) if many else undefined),
            "loss": ("layer", -data["log_probability"][:, scored].mean(1) if many else undefined),
        },
        {"layer": layers, "row": rows, "position": ("row", position)},
        {
            "n": int(inner.sum()),
            "sample": f"{len(rows):,} rows" + (f", evenly spaced in {given:,}" if len(rows) < given else ""),
            "reference": said,
        },
    )


def next_tokens(store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the next token of each row in its document, -1 if there is none, and the position of each row."""
    about = {name: np.asarray(variable.values) for name, variable in store.coordinates.items()}
    position, document = about["position"][rows].astype(np.int64), about["document"][rows]
    after = np.minimum(rows + 1, store.n_rows - 1)
    follows = (about["document"][after] == document) & (about["position"][after] == position + 1)
    return np.where(follows, about["token_id"][after], -1).astype(np.int64), position
