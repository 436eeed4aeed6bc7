"""Evaluate probes on other data: other stores, layers, labels or positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from analysis.dataset.layer_choice import choose_layers
from analysis.dataset.probe_dataset import build_dataset
from analysis.dataset.readable import Readable, Rows
from analysis.dataset.store_argument import accept_store_path
from analysis.dataset.targets import DocumentTarget, TokenTarget
from analysis.probes.class_pairs import pair_classes, paired_targets, usable_pairs
from analysis.probes.estimators.linear import LogOdds, coded
from analysis.probes.evaluation import score
from analysis.probes.evaluation.score import Prediction
from analysis.probes.results import Sweep
from analysis.probes.sweep import sweep as sweep_layers
from flexcache.errors import AnalysisError
from flexcache.site import Layers


@accept_store_path
def transfer(
    sweep: Sweep,
    store: Readable,
    target: str | TokenTarget | DocumentTarget | None = None,
    *,
    classes: Mapping[Any, Any] | None = None,
    layers: Layers | None = None,
    across: bool = False,
    groups: str | None = "document",
    rows: Rows | None = None,
    resamples: int = 1000,
    seed: int = 0,
    other_model: bool = False,
) -> xr.Dataset:
    """Score the weights of a sweep, fitted to all of its samples, on another store, without fitting.

    ::

        found = probes.transfer(sweep, other_store, "label")
        found["score"].sel(metric="accuracy")

    Parameters
    ----------
    sweep
        Sweep of a linear probe.
    target
        Target of the sweep by default.
    classes
        Class of the probe for each class of the target, such as ``{"fresh": "positive", "rotten": "negative"}``, or the
        other way round. Classes that it does not name are paired by equal names; samples of classes without a pair are
        left out and counted.
    layers
        Layers of the sweep by default.
    across
        Also apply the weights of each layer to the activations of every other layer.
    groups, rows
        See `analysis.probe_dataset.build_dataset`; the bootstrap draws whole groups.
    other_model
        Score the weights on activations of another model too, such as the base model with an adapter.

    Returns
    -------
    Dataset with dims (trained, tested, metric), or (layer, metric) without *across*: ``score``, ``ci_low`` and
    ``ci_high``. ``attrs["classes"]`` is the pairing, from the class of the target to that of the probe, and
    ``attrs["left_out"]`` the number of samples of each class without a pair.

    Raises
    ------
    AnalysisError
        The probe is not linear; the store comes from another model, without *other_model*, or lacks site, layers or
        target; fewer than two classes of the probe have a pair; or *classes* names a class that neither has.
    """
    asked = sweep.results.attrs
    sweep.to_direction(None if sweep.layers[0] < 0 else sweep.layers[0]).check(store, other_model)
    chosen = _probed_layers(sweep, store, layers)
    wanted = asked["rows"] if rows is None else rows
    dataset = build_dataset(
        store,
        asked["site"],
        asked["target"] if target is None else target,
        groups=groups,
        rows=wanted,
        layers="all" if chosen == [-1] else chosen,
        task=asked["task"],
    )
    pairs = pair_classes(dataset, asked["classes"], classes)
    y, kept, left_out = paired_targets(dataset, asked["classes"], pairs)
    probable = "log_loss" in sweep.metrics
    metrics = score.metrics(dataset.task, len(asked["classes"]), True, probable)
    found = np.full((len(chosen), len(chosen), len(metrics), 3), np.nan)
    everything, group = np.zeros(int(kept.sum()), np.int64), np.unique(dataset.group[kept], return_inverse=True)[1]
    for column, layer in enumerate(chosen):
        X = dataset.read_layer(None if layer < 0 else layer)[kept].astype(np.float64)
        for row in range(len(chosen)) if across else [column]:
            prediction = _predict(sweep, sweep.layers.index(chosen[row]), X, probable)
            of = (metrics, y, prediction, everything, group)
            low, high = score.covering_interval(*of, resamples=resamples, seed=seed)
            for m, metric in enumerate(metrics):
                found[row, column, m] = score.pooled(metric, y, prediction, everything, group), low[m], high[m]
    names = ("score", "ci_low", "ci_high")
    attrs = {
        "target": dataset.target,
        "trained_on": asked["target"],
        "metric": metrics[0],
        "samples": int(kept.sum()),
        "classes": pairs,
        "left_out": left_out,
        "dropped": dict(dataset.dropped),
    }
    if across:
        return xr.Dataset(
            {name: (("trained", "tested", "metric"), found[..., n]) for n, name in enumerate(names)},
            {"trained": chosen, "tested": chosen, "metric": list(metrics)},
            attrs,
        )
    own = found[np.arange(len(chosen)), np.arange(len(chosen))]
    return xr.Dataset(
        {name: (("layer", "metric"), own[..., n]) for n, name in enumerate(names)},
        {"layer": chosen, "metric": list(metrics)},
        attrs,
    )


def transfer_matrix(
    sweeps: Mapping[str, Sweep],
    stores: Mapping[str, tuple[Readable, str]],
    layer: int | None = None,
    *,
    classes: Mapping[Any, Any] | None = None,
    **options: Any,
) -> xr.Dataset:
    """Score every sweep on every store and label, with the weights of one layer each.

    ::

        found = probes.transfer_matrix({"films": sweep}, {"films": (store, "label"), "books": (other, "label")})
        probes.transfer_map(found)

    Parameters
    ----------
    sweeps
        Sweeps by name.
    stores
        Pairs of store and target by name.
    layer
        The best layer of each sweep by default.
    classes
        As for `transfer`; a pair is used where one of its names is a class of the target and the other of the probe.
    options
        Arguments of `transfer`.

    Returns
    -------
    Dataset with dims (trained, tested): ``score``, ``ci_low``, ``ci_high`` of the first metric
    """
    values = np.full((3, len(sweeps), len(stores)), np.nan)
    metric = ""
    for i, sweep in enumerate(sweeps.values()):
        best = sweep.best.layer
        at = layer if layer is not None else -1 if best is None else best
        for j, (store, target) in enumerate(stores.values()):
            pairs = None
            if classes is not None:
                asked = sweep.results.attrs
                dataset = build_dataset(store, asked["site"], target, task=asked["task"])
                pairs = usable_pairs(dataset, asked["classes"], classes)
            only = None if at < 0 else at
            found = transfer(sweep, store, target, layers=only, classes=pairs, **options).isel(layer=0, metric=0)
            values[:, i, j] = [float(found[name]) for name in ("score", "ci_low", "ci_high")]
            metric = str(found["metric"].values)
    return xr.Dataset(
        {name: (("trained", "tested"), values[n]) for n, name in enumerate(("score", "ci_low", "ci_high"))},
        {"trained": list(sweeps), "tested": list(stores)},
        {"metric": metric},
    )


@accept_store_path
def by_position(
    store: Readable,
    target: str,
    site: str,
    probe: BaseEstimator | None = None,
    *,
    positions: Sequence[int],
    **options: Any,
) -> xr.Dataset:
    """Sweep the layers at each of several token positions.

    ::

        found = probes.by_position(store, "label", "resid_post", positions=[0, 4, -1])
        probes.heat_map(found)

    Parameters
    ----------
    positions
        Token positions; negative ones count from the end of a document. Documents without the token are left out, so
        positions may differ in their documents; ``documents`` is their number.
    options
        Arguments of `analysis.probes.sweep`.

    Returns
    -------
    Dataset with dims (position, layer): ``pooled``, ``ci_low``, ``ci_high`` of the first metric; and ``documents``
    (position)
    """
    found = [sweep_layers(store, target, site, probe, rows=int(position), **options) for position in positions]
    names = ("pooled", "ci_low", "ci_high")
    first = [sweep.results.sel(arm="probe").isel(metric=0) for sweep in found]
    return xr.Dataset(
        {name: (("position", "layer"), np.stack([data[name].values for data in first])) for name in names}
        | {"documents": ("position", [sweep.results.attrs["documents"] for sweep in found])},
        {"position": list(positions), "layer": list(found[0].layers)},
        {"metric": found[0].metrics[0], "target": target, "site": site},
    )


def _probed_layers(sweep: Sweep, store: Readable, layers: Layers | None) -> list[int]:
    """Return the layers of a sweep that *layers* names, all for None; raise AnalysisError if one was not probed."""
    if layers is None:
        return list(sweep.layers)
    asked = [-1 if layer is None else layer for layer in choose_layers(store, sweep.results.attrs["site"], layers)]
    if missing := [layer for layer in asked if layer not in sweep.layers]:
        raise AnalysisError(
            f"layer {', '.join(map(str, missing))} was not probed",
            expected=f"some of {', '.join(map(str, sweep.layers))}",
            found=f"layers={layers!r}",
        )
    return asked


def _predict(sweep: Sweep, at: int, X: NDArray[np.float64], probable: bool) -> Prediction:
    assert sweep.coef is not None
    assert sweep.intercept is not None
    decision = X @ sweep.coef[at].T + sweep.intercept[at]
    if sweep.results.attrs["task"] == "regression":
        return Prediction(decision[:, 0], decision[:, 0])
    codes = coded(decision)
    probability = None
    if probable:
        probability = LogOdds.probabilities(decision)
    return Prediction(codes, decision[:, 0] if decision.shape[1] == 1 else codes.astype(float), probability)
