"""Compute the usual statistics of a store in one read, as ``flexcache stats`` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from analysis import saved
from analysis.arguments import check_whole
from analysis.dataset.document_columns import joined_labels
from analysis.dataset.store_argument import accept_store_path
from analysis.dataset.tokens import TokenTypes
from analysis.readout import lens
from analysis.readout.examples import TopRows
from analysis.readout.head import Head
from analysis.rescue import write_or_rescue
from analysis.statistics import similarity
from analysis.statistics.covariance import ROWS as COVARIANCE_ROWS
from analysis.statistics.geometry import PCA
from analysis.statistics.kept_rows import Rows
from analysis.statistics.moments import Moments
from analysis.statistics.onepass import DocumentSample, Statistic, grouping, read
from analysis.statistics.outliers import Extremes, judged
from analysis.statistics.quantiles import Histogram
from flexcache.errors import AnalysisError, nearest
from flexcache.keywords import check_keywords
from flexcache.paths import local_path, output_folder
from flexcache.site import Layers
from flexcache.spec import listed
from flexcache.store.read.store import Store

PARTS = ("moments", "pca", "quantiles", "outliers", "similarity", "lens", "examples")
COMPONENTS = 16
EXAMPLES = 16
SUFFIX = ".stats.zarr"


@dataclass(frozen=True)
class Survey:
    """Statistics of one site by name, with their provenance; returned by `survey` and `load`.

    ::

        found = survey.load("results", "resid_post")
        found["moments"], "pca" in found

    Attributes
    ----------
    site : str
    results : dict of Dataset
        ``moments`` by the groups asked for and ``total`` by layer alone, ``pca``, ``quantiles``, ``outliers``,
        ``similarity``, ``lens``, ``examples``; those of them that were requested.
    provenance : dict
        Store, rows, arguments and versions.
    reused : bool
        True if they were loaded from a folder instead of computed.
    """

    site: str
    results: dict[str, xr.Dataset] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)
    reused: bool = False

    def __getitem__(self, name: str) -> xr.Dataset:
        try:
            return self.results[name]
        except KeyError:
            raise AnalysisError(
                f"the statistics do not include {name!r}", remedy=nearest(name, tuple(self.results))
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.results

    def save(self, folder: str | Path) -> Path:
        """Write the results into *folder* and return their path."""
        return saved.save(self.results, results_path(folder, self.site), self.provenance)


def results_path(folder: str | Path, site: str) -> Path:
    """Return the path of the results of a site in a folder."""
    return local_path(folder) / f"{site}{SUFFIX}"


def load(folder: str | Path, site: str) -> Survey:
    """Load results that `Survey.save` wrote.

    ::

        survey.load("results", "resid_post")["pca"]

    Raises
    ------
    AnalysisError
        The folder has no such results.
    """
    results, provenance = saved.load(results_path(folder, site))
    return Survey(site, results, provenance, reused=True)


@accept_store_path
def load_existing(store: Store, folder: str | Path, site: str, model: str | Path | None = None) -> Survey | None:
    """Return the results in *folder* if they come from the rows and labels that *store* has now; otherwise None.

    ::

        survey.load_existing(store, "stats", "resid_post")

    Parameters
    ----------
    model
        A checkpoint folder: None is also returned if the lens in the results is that of another head.
    """
    if not saved.reusable(results_path(folder, site), {"of": saved.identity(store), "site": site}):
        return None
    found = load(folder, site)
    labels = found.provenance.get("labels", {})
    if store.label_checksums(labels) != labels:  # a joined label was replaced or removed
        return None
    if model is not None and "lens" in found and found.provenance["lens"]["head"] != Head.load(model).identity():
        return None
    return found


@accept_store_path
def survey(
    store: Store,
    site: str = "resid_post",
    *,
    only: str | Sequence[str] | None = None,
    by: str | Sequence[str] = ("layer", "position"),
    layers: Layers = "all",
    rows: int | None = COVARIANCE_ROWS,
    similarity_rows: int | None = None,
    permutations: int = 100,
    seed: int = 0,
    token_types: TokenTypes | None = None,
    head: Any = None,
    folder: str | Path | None = None,
    **where: Any,
) -> Survey:
    """Compute statistics of a site in one read, or load them from *folder* if it has the same ones.

    ::

        from analysis.survey import survey

        found = survey(store, "resid_post", only=["moments", "pca"], folder="results")
        found["pca"]["effective_rank"]

    The first token of each document is left out of PCA, similarity and lens, is separate in outliers, and is included
    in the other parts.

    Parameters
    ----------
    only
        Names from `PARTS`; by default all but ``lens``, which is added if *head* is given.
    by
        Groups of the moments; see `analysis.moments.compute`.
    rows, similarity_rows
        Approximate number of rows for covariances, and for similarity and lens: whole documents of a seeded sample. The
        exact number is in the results. By default 1,024 for similarity, and for lens as in `analysis.lens.compute`.
    head
        Final norm and unembedding, or a loaded model; see `analysis.lens.compute`.
    folder
        Folder of the results; results in it are reused if store, rows, arguments, versions and, for the lens, the
        values of the head or model are equal.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Raises
    ------
    ConfigError
        Nothing can be written to *folder*.
    AnalysisError
        A part or keyword is unknown, or a number cannot be used; see also `analysis.statistics.onepass.read`.
    OutputError
        The results cannot be written to *folder*; the error names the folder that holds them.
    """
    check_keywords(survey, where, ("scheduler", "workers", "progress"), AnalysisError)
    for name, value, least in (("rows", rows, 2), ("similarity_rows", similarity_rows, 2)):
        if value is not None:
            check_whole(name, value, least)
    similarity.check_permutations(permutations, seed)
    folder = None if folder is None else output_folder(folder)
    if folder is not None:
        saved.check_free(results_path(folder, site))
    parts, by = _parts(listed(only, str, "only"), head), listed(by, str, "by")
    statistics = _statistics(store, site, parts, by, rows, similarity_rows or similarity.ROWS, seed, token_types)
    head, model = lens.chosen_head(store, head, site) if "lens" in parts else (None, None)
    asked = {name: statistic.describe() for name, statistic in statistics.items()}
    provenance = {
        "of": saved.identity(store),
        "site": site,
        "layers": str(layers),
        "parts": list(parts),
        "asked": asked,
        "permutations": permutations,
        "permuted": "documents",
        "seed": seed,
        "versions": saved.versions(),
        **joined_labels(store, by),
    }
    if head is not None:
        provenance["lens"] = {**lens.identity(head, model), "rows": similarity_rows}
    if folder is not None and saved.reusable(results_path(folder, site), provenance):
        return load(folder, site)
    began = time.perf_counter()
    found = read(store, site, statistics, layers=layers, **where)
    provenance |= {"read_seconds": round(time.perf_counter() - began, 3), "rows_read": found.rows}
    results: dict[str, xr.Dataset] = {}
    for name in ("total", "moments", "pca", "quantiles", "examples"):
        if name in parts or (name == "total" and "moments" in parts):
            results[name] = found[name] if name != "moments" or "layer" in by else found.merged(name)
    if "pca" in results:
        results["pca"].attrs |= {"site": site, "store": str(store.path)}
    if "outliers" in parts:
        results["outliers"] = judged(found["outliers"], found["quantiles"])
    if "similarity" in parts or "lens" in parts:
        kept = {layer: found.states[layer]["rows"] for layer in found.layers}
        if "similarity" in parts:
            named = {str(site if layer is None else layer): state["values"] for layer, state in kept.items()}
            document = store.coordinates["document"].values[kept[found.layers[0]]["row"]]
            results["similarity"] = similarity.between(named, documents=document, permutations=permutations, seed=seed)
        if "lens" in parts:
            values = {int(layer or 0): state["values"] for layer, state in kept.items()}
            results["lens"] = lens.of_rows(
                store,
                head,
                values,
                kept[found.layers[0]]["row"],
                site=site,
                model=model,
                most=similarity_rows or lens.affordable_rows(head, len(values)),
                **{name: where[name] for name in ("workers", "progress") if name in where},
            )
    answer = Survey(site, results, provenance)
    if folder is not None:
        write_or_rescue(answer.save, folder)
    return answer


def _parts(only: Sequence[str] | None, head: Any) -> tuple[str, ...]:
    wrong = [name for name in only or () if name not in PARTS]
    if wrong:
        raise AnalysisError(f"there is no statistic {wrong[0]!r}", remedy=nearest(wrong[0], PARTS))
    if only:
        return tuple(name for name in PARTS if name in only)
    return tuple(name for name in PARTS if name != "lens" or head is not None)


def _statistics(
    store: Store,
    site: str,
    parts: tuple[str, ...],
    by: Sequence[str],
    rows: int | None,
    similarity_rows: int,
    seed: int,
    token_types: TokenTypes | None,
) -> dict[str, Statistic]:
    """Return the statistics that the parts need, each one once."""
    found: dict[str, Statistic] = {}
    skip = int(store.spec.rows == "all")  # skip the first token if there are others
    if "moments" in parts:
        found["total"] = Moments()
        found["moments"] = Moments(grouping(store, by, token_types=token_types))
    if "pca" in parts:
        sample = DocumentSample.of_rows(rows, store.n_rows, seed, skip)
        found["pca"] = PCA(sample, components=COMPONENTS)
    if "quantiles" in parts or "outliers" in parts:
        found["quantiles"] = Histogram()
    if "outliers" in parts:
        found["outliers"] = Extremes()
    if "similarity" in parts or "lens" in parts:
        found["rows"] = Rows(similarity_rows, DocumentSample.of_rows(similarity_rows, store.n_rows, seed, skip))
    if "examples" in parts and site in store.arrays:
        found["examples"] = TopRows(tuple(range(store.arrays[site].features)), EXAMPLES, per_document=1)
    return found
