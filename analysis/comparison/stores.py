"""Compare two stores of the same tokens: differences of activations, and their cost for a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from sklearn.base import BaseEstimator

from analysis import saved
from analysis.arguments import check_whole
from analysis.dataset.aligned_store import AlignedStore, align_stores
from analysis.dataset.layer_choice import choose_layers
from analysis.dataset.store_argument import accept_store_path
from analysis.probes.comparison import compare
from analysis.probes.options import SweepOptions
from analysis.probes.sweep import Target, sweep_pair
from analysis.statistics import similarity
from analysis.statistics.difference import Difference
from analysis.statistics.kept_rows import PairedRows
from analysis.statistics.onepass import DocumentSample, Statistic, read
from analysis.statistics.onepass.scheduler import choose_scheduler
from flexcache.errors import AnalysisError, nearest
from flexcache.paths import local_path
from flexcache.site import Layers
from flexcache.spec import listed
from flexcache.store.format.model_comparison import differences
from flexcache.store.format.provenance import recorded_model
from flexcache.store.read.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRIALS = ("first", "second", "first on second")
"""Store that a probe is fitted to, and, if it is another one, scored on."""
FILE = "compare.zarr"


@dataclass(frozen=True, repr=False)
class StoreComparison:
    """Distances between two stores by site and layer; returned by `compare_stores` and `load`.

    ::

        found = compare_stores("float32.zarr", "nf4.zarr", target="label")
        found["resid_post"]["error_median"].sel(layer=12)
        found["resid_post"]["score"].sel(trial="first on second")

    Attributes
    ----------
    results : dict of Dataset
        By site, with dim ``layer`` (-1 for a site without layers): the variables of
        `analysis.statistics.difference.Difference.result`, and ``cka``, the debiased linear CKA of ``cka_rows`` sampled
        rows (`analysis.similarity.between`). With a target, also ``score, score_low, score_high`` of a probe, dims
        (trial, layer), and ``difference, difference_low, difference_high``, the score of the trial less that of
        ``first``, paired sample by sample (`analysis.probes.compare`). Trials are ``first`` and ``second``, a probe
        that is fitted to and scored on a store, and ``first on second``. All intervals are 95 %, over groups. Values
        that are not defined are NaN.
    skipped : dict
        Sites and layers that only one of the stores has, or that cannot be compared, with the reason.
    provenance : dict
        Both stores, arguments and versions.
    """

    results: dict[str, xr.Dataset]
    skipped: dict[str, str]
    provenance: dict[str, Any]

    def __getitem__(self, site: str) -> xr.Dataset:
        try:
            return self.results[site]
        except KeyError:
            raise AnalysisError(
                f"the comparison does not include site {site!r}", remedy=nearest(site, tuple(self.results))
            ) from None

    def __repr__(self) -> str:
        lines = ["<StoreComparison: median error of a row; CKA"]
        for site, result in self.results.items():
            for n, layer in enumerate(result["layer"].values.tolist()):
                error, cka = (float(result[name].values[n]) for name in ("error_median", "cka"))
                lines.append(f"  {site if layer < 0 else f'{site} {layer}'}: {error:.3g}; {cka:.4f}")
        lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines) + ">"

    def save(self, folder: str | Path) -> Path:
        """Write the results into *folder*, as ``compare.zarr``, and return their path."""
        return saved.save(
            self.results,
            local_path(folder) / FILE,
            {**self.provenance, "skipped": self.skipped, "sites": [*self.results]},
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw error, cosine, CKA and scores by layer, and write the figure to *path* if it is given."""
        from analysis.comparison.plot import plot

        return plot(self.results, self.provenance, path)


def load(folder: str | Path) -> StoreComparison:
    """Load a comparison that `StoreComparison.save` wrote.

    ::

        comparison.load("compare")["resid_post"]["cka"]

    Raises
    ------
    AnalysisError
        The folder has no such results.
    """
    results, provenance = saved.load(local_path(folder) / FILE)
    return StoreComparison(results, provenance.pop("skipped"), provenance)


@accept_store_path
def compare_stores(
    store: Store,
    other: Store,
    sites: str | Sequence[str] | None = None,
    *,
    target: Target | None = None,
    probe: BaseEstimator | None = None,
    similarity_rows: int = similarity.ROWS,
    options: SweepOptions | None = None,
    scheduler: Any = "threads",
    workers: int | None = None,
    **named: Any,
) -> StoreComparison:
    """Compare every site and layer that two stores have in common, over the same tokens.

    ::

        from analysis.comparison import compare_stores

        found = compare_stores("float32.zarr", "int8.zarr", target="label", cv=5)
        found["resid_post"]["cosine_low"]
        found.plot("compare.png")

    Rows are matched by document id and position, so the stores may differ in order, dtype and shards, and in all that
    computed them: quantization, an adapter, another engine, another number of processes. Both are read once, shard by
    shard; see `analysis.statistics.onepass.read`. Rows that only one of them has committed are left out.

    If a layer has other features in the two stores, only CKA is defined.

    Parameters
    ----------
    store, other
        Two stores, or their paths. Errors are relative to the first.
    sites
        All sites that both have, by default; likewise *layers*, a keyword.
    target
        Label of the documents of *store*, or a target of `analysis.targets`: a probe is cross-validated on both
        stores, and the probes of the first are scored on the second, with the same folds.
    probe
        As for `analysis.probes.sweep`.
    similarity_rows
        Approximate number of rows for CKA: whole documents of a seeded sample, without their first tokens.
    options, named
        A `SweepOptions` of `analysis.probes`, and its fields as keywords: seed and progress, and cv, groups, rows and
        others for the probe. Baselines are not fitted.
    scheduler, workers
        See `analysis.statistics.onepass.read`.

    Raises
    ------
    AnalysisError
        The stores hold other documents, tokens or rows, or have no site and layer in common; see also
        `analysis.probes.sweep`.
    """
    check_whole("similarity_rows", similarity_rows, similarity.FEWEST)
    chosen = SweepOptions.merge(options, named, compare_stores)
    check_whole("seed", chosen.seed, 0)
    chosen = replace(chosen, baselines=(), mdl=False, repeats=1, nulls=1)
    runner = choose_scheduler(scheduler, workers)
    aligned = align_stores(store, other)
    skipped: dict[str, str] = {}
    common = _common_layers(store, other, sites, chosen.layers, skipped)
    widths = {site: (store.arrays[site].features, other.arrays[site].features) for site in common}
    equal = [site for site, (one, two) in widths.items() if one == two]
    probed = {}
    for site in equal if target is not None else ():  # before the pass, because a target may be wrong
        assert target is not None
        probed[site] = _probe(store, aligned, target, site, probe, replace(chosen, layers=common[site]))
    skip = int(store.spec.rows == "all")  # first tokens, whose few huge values would dominate CKA
    sample = DocumentSample.of_rows(similarity_rows, store.n_rows, chosen.seed, skip)
    where = {"scheduler": runner.name, "workers": runner.workers, "progress": chosen.progress}
    results = {}
    for site, layers in common.items():
        statistics: dict[str, Statistic] = {"rows": PairedRows(similarity_rows, sample, widths[site][1])}
        if site in equal:
            statistics["difference"] = Difference()
        else:
            one, two = widths[site]
            skipped[site] = f"{one} features in the first store, {two} in the second: only CKA is defined"
        found = read(store, site, statistics, layers=layers, other=aligned, **where)
        sampled = [found.states[layer]["rows"] for layer in found.layers]
        numbered = [-1 if layer is None else layer for layer in found.layers]
        data = found["difference"] if site in equal else xr.Dataset(coords={"layer": numbered})
        data["cka"] = "layer", [similarity.debiased_cka(rows["values"], rows["other"]) for rows in sampled]
        data["cka_rows"] = "layer", [len(rows["row"]) for rows in sampled]
        if site in probed:
            data = data.merge(probed[site]).assign_attrs(probed[site].attrs)
        results[site] = data
    provenance = {
        "of": saved.identity(store),
        "other": saved.identity(other),
        "stores": [store.path.name, other.path.name],
        "rows": store.n_rows,
        "models": differences(recorded_model(store), recorded_model(other)),
        "target": None if target is None else target if isinstance(target, str) else target.name,
        "seed": chosen.seed,
        "similarity_rows": similarity_rows,
        "versions": saved.versions(),
    }
    return StoreComparison(results, skipped, provenance)


def _common_layers(
    store: Store, other: Store, sites: str | Sequence[str] | None, layers: Layers, skipped: dict[str, str]
) -> dict[str, Layers]:
    """Return the layers of each site that both stores have, and add what only one has to *skipped*."""
    found: dict[str, Layers] = {}
    asked = listed(sites, str, "sites") or tuple(dict.fromkeys([*store.sites, *other.sites]))
    for site in asked:
        held = [site in one.sites for one in (store, other)]
        if not all(held):
            if not any(held):
                raise AnalysisError(f"neither store has a site {site!r}", remedy=nearest(site, store.sites))
            skipped[site] = f"only in the {'first' if held[0] else 'second'} store"
            continue
        virtual = [one.arrays[site].virtual for one in (store, other)]
        for hidden, which in zip(virtual, ("first", "second"), strict=True):
            if hidden:
                text = f"virtual in the {which} store: attach its model to compare them"
                skipped[f"{site}, layer {', '.join(map(str, hidden))}"] = text
        if any(hidden and not one.layers(site) for hidden, one in zip(virtual, (store, other), strict=True)):
            continue
        one, two = (tuple(held.layers(site)) or (None,) for held in (store, other))
        chosen = choose_layers(store, site, layers if store.layers(site) else "all")
        if alone := [str(layer) for layer in chosen if layer not in (*two, *virtual[1])]:
            skipped[f"{site}, layer {', '.join(alone)}"] = "only in the first store"
        if layers == "all" and (alone := [str(layer) for layer in two if layer not in (*one, *virtual[0])]):
            skipped[f"{site}, layer {', '.join(alone)}"] = "only in the second store"
        if shared := [layer for layer in chosen if layer in two]:
            found[site] = [layer for layer in shared if layer is not None] or "all"
    if not found:
        raise AnalysisError(
            "the stores have no site and layer in common",
            where=f"{store.path} and {other.path}",
            found="; ".join(f"{name}: {why}" for name, why in skipped.items()),
            remedy="capture the same sites and layers in both",
        )
    return found


def _probe(
    store: Store,
    aligned: AlignedStore,
    target: Target,
    site: str,
    probe: BaseEstimator | None,
    options: SweepOptions,
) -> xr.Dataset:
    """Return the scores of probes in both stores, with the paired loss of each trial."""
    sweeps = dict(zip(TRIALS, sweep_pair(store, aligned, target, site, probe, options=options), strict=True))
    first = sweeps["first"]
    metric, layers = first.metrics[0], first.layers
    found: dict[str, Any] = {}
    for name, of in (("score", "pooled"), ("score_low", "ci_low"), ("score_high", "ci_high")):
        scores = [sweep.results[of].sel(arm="probe", metric=metric).values for sweep in sweeps.values()]
        found[name] = ("trial", "layer"), np.stack(scores)
    names = ("difference", "ci_low", "ci_high")
    values = np.zeros((3, len(TRIALS), len(layers)))
    for at, layer in enumerate(layers):
        for number, name in enumerate(TRIALS[1:], 1):
            pair = compare({name: (sweeps[name], layer), "first": (first, layer)}, metric=metric).isel(pair=0)
            values[:, number, at] = [float(pair[one]) for one in names]
    for name, part in zip(("difference", "difference_low", "difference_high"), values, strict=True):
        found[name] = ("trial", "layer"), part
    facts = {name: first.results.attrs[name] for name in ("probe", "cv", "samples", "groups_found", "rows", "dropped")}
    facts["notes"] = [note for note in first.results.attrs["notes"] if not note.startswith(first.metrics[1:])]
    return xr.Dataset(found, {"trial": list(TRIALS), "layer": list(layers)}, {"metric": metric, **facts})
