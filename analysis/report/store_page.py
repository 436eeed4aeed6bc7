"""Write the page of a store with its statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup

from analysis.dataset.store_argument import accept_store_path
from analysis.dataset.tokens import Vocabulary
from analysis.readout import examples
from analysis.report import facts
from analysis.report.drawing import NUMBERED, curves, heatmap
from analysis.report.template import write_page
from analysis.statistics import outliers
from analysis.survey import Survey
from flexcache.site import EXPERT_NEURONS
from flexcache.store.format.text import layer_text
from flexcache.store.read.store import Store

TEMPLATE = "store.html.j2"
SHOWN_DIMS = 2


@accept_store_path
def write(
    store: Store,
    found: Survey,
    path: str | Path,
    *,
    words: Vocabulary | None = None,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write one self-contained HTML file about a store: no script, no network, light and dark colours.

    ::

        store_page.write(store, survey(store), "store.html")

    Parameters
    ----------
    store
        A store, or its path.
    found
        Result of `analysis.survey.survey` for it; parts that it lacks are left out.
    words
        Vocabulary for the text of tokens; by default that of the model of the store, if it is available.
    path
        Path of the file; folders are made.
    command
        Command line that made the statistics.

    Returns
    -------
    Path
        The file. All texts from data are escaped.
    """
    name = store.provenance.model_name.rstrip("/").rsplit("/", 1)[-1]
    return write_page(
        TEMPLATE,
        path,
        title=title or f"{found.site} of {name or 'a model'}",
        store=store.path.name,
        documents=len(store.documents),
        rows=len(store.committed_rows),
        cards=_cards(found),
        captured=facts.captured(store),
        norms=_norms(found),
        spectra=_spectra(found),
        similarity=_similarity(found),
        anisotropy=_anisotropy(found),
        massive=_massive(found, store),
        neurons=_neurons(found, store),
        lens=_lens(found),
        examples=_examples(found, store, words),
        command=command,
        provenance=json.dumps(
            {"store": store.provenance.to_json(), "statistics": found.provenance}, indent=2, default=str
        ),
    )


def _layers(result: xr.Dataset) -> np.ndarray:
    return np.asarray(result["layer"].values)


def _cards(found: Survey) -> list[tuple[str, str, str]]:
    """Return the most important numbers: name, number, explanation."""
    cards = []
    if "total" in found:
        norm = found["total"]["norm_mean"].values
        layers = _layers(found["total"])
        name = f"norm, layer {layers[0]} to {layers[-1]}" if len(layers) > 1 else "norm"
        cards.append((name, " → ".join(dict.fromkeys(map(_number, norm[[0, -1]]))), "mean length of a row"))
    if "pca" in found:
        rank = found["pca"]["effective_rank"].values
        cards.append(
            ("effective rank", f"{rank.min():.0f} – {rank.max():.0f}", f"of {found['pca'].sizes['component']} dims")
        )
    if "outliers" in found:
        largest = np.abs(found["outliers"]["value"].values)
        place = np.unravel_index(largest.argmax(), largest.shape)
        layer = _layers(found["outliers"])[place[0]]
        cards.append(("largest activation", f"{largest.max():,.0f}", f"dim {place[3]}, layer {layer}"))
    if "lens" in found:
        reached = _layers(found["lens"])[found["lens"]["agreement"].values >= 0.5]
        if found["lens"]["agreement"].notnull().any():
            first = f"layer {reached[0]}" if len(reached) else "none of these layers"
            cards.append(
                ("half of the predictions stand", first, f"top token of the lens and of {found['lens'].reference}")
            )
    return cards


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _norms(found: Survey) -> Markup | None:
    if "total" not in found:
        return None
    lines: dict[str, np.ndarray] = {}
    moments = found.results["moments"]
    if (
        "position" in moments["norm_mean"].dims
        and "layer" in moments["norm_mean"].dims
        and moments.sizes["position"] > 1
    ):
        other = [dim for dim in moments["n"].dims if dim not in ("layer", "position")]
        n, total = moments["n"].sum(other), (moments["norm_mean"].fillna(0) * moments["n"]).sum(other)
        if int(moments["position_stop"][0]) == 1 and (n.isel(position=0) > 0).all() and (n.sum("position") > 0).all():
            lines["first token"] = (total.isel(position=0) / n.isel(position=0)).values
            rest = {"position": slice(1, None)}
            lines["other tokens"] = (total.isel(rest).sum("position") / n.isel(rest).sum("position")).values
    if not lines:
        lines["all tokens"] = found["total"]["norm_mean"].values
    return Markup(curves("norms", _layers(found["total"]), lines, label="mean norm by layer", ylabel="norm", log=True))


def _spectra(found: Survey) -> list[Markup]:
    if "pca" not in found:
        return []
    pca = found["pca"]
    layers = _layers(pca)
    ranks = {"effective rank": pca["effective_rank"].values, "participation ratio": pca["participation_ratio"].values}
    chosen = np.unique(np.linspace(0, len(layers) - 1, 4).round().astype(int))
    share = pca["share"].values
    spectra = {f"layer {layers[i]}": np.where(share[i] > 1e-9, share[i], np.nan) for i in chosen}
    component = np.arange(1, share.shape[1] + 1)
    return [
        Markup(curves("ranks", layers, ranks, label="effective rank by layer", ylabel="dims", log=True)),
        Markup(
            curves("spectra", component, spectra, label="spectra", xlabel="component", ylabel="share of the variance",
                   log=True, log_x=True)
        ),
    ]  # fmt: skip


def _similarity(found: Survey) -> dict[str, Any] | None:
    if "similarity" not in found or found["similarity"].sizes["one"] < 2:
        return None
    similarity = found["similarity"]
    names = [str(name) for name in similarity["one"].values]
    chance = float(similarity["cka_null"].max()) if "cka_null" in similarity else None
    return {
        "n": similarity.attrs["n"],
        "permutations": similarity.attrs["permutations"],
        "hover": len(names) > NUMBERED,
        "chance": None if chance is None else f"{chance:.3f}",
        "cka": Markup(heatmap(similarity["cka"].values, names, "debiased CKA of each layer with each")),
        "cca": Markup(heatmap(similarity["cca"].values, names, "mean squared canonical correlation")),
    }


def _anisotropy(found: Survey) -> Markup | None:
    if "outliers" not in found:
        return None
    rest = found["outliers"].sel(part="rest")
    if not np.isfinite(rest["cosine"]).all():
        return None
    lines = {"mean cosine of two rows": rest["cosine"].values, "share of it in one dim": rest["rogue_share"].values}
    return Markup(curves("cosine", _layers(rest), lines, label="mean cosine and the share of one dim in it"))


def _massive(found: Survey, store: Store) -> list[dict[str, Any]] | None:
    """Return a line for each feature with massive activations, largest first."""
    if "outliers" not in found:
        return None
    dims: dict[int, dict[str, Any]] = {}
    for line in outliers.massive(found["outliers"], store):
        dim = dims.setdefault(line["dim"], {**line, "layers": set(), "positions": set()})
        dim["layers"].add(line["layer"])
        dim["positions"].add(line["position"])
    return [
        {
            **dim,
            "value": f"{dim['value']:,.0f}",
            "layers": layer_text(tuple(sorted(dim["layers"]))),
            "positions": layer_text(tuple(sorted(dim["positions"]))),
        }
        for dim in list(dims.values())[:12]
    ]


def _neurons(found: Survey, store: Store) -> str | None:
    if "outliers" not in found or found.site != "mlp_post" or store.arrays["mlp_post"].feature_dim == EXPERT_NEURONS:
        return None
    dead, always = (found["outliers"][name].sum("feature").values for name in ("dead", "always_on"))
    return f"{int(dead.sum()):,} of {found['outliers']['dead'].size:,} are dead, {int(always.sum()):,} always on."


def _lens(found: Survey) -> dict[str, Any] | None:
    if "lens" not in found:
        return None
    lens = found["lens"]
    lines = {"entropy": lens["entropy_mean"].values}
    if np.isfinite(lens["kl_mean"].values).all():
        lines = {f"KL from {lens.reference}": lens["kl_mean"].values, **lines}
    if np.isfinite(lens["loss"].values).all():
        lines["loss of the next token"] = lens["loss"].values
    ranks = {"median rank of the next token": 1 + lens["rank_median"].values}
    return {
        "sample": lens.attrs["sample"],
        "reference": lens.attrs["reference"],
        "nats": Markup(curves("lens", _layers(lens), lines, label="logit lens by layer", ylabel="nats")),
        "rank": Markup(
            curves("lens-rank", _layers(lens), ranks, label="rank of the next token", ylabel="rank", log=True)
        ),
    }


def _examples(found: Survey, store: Store, words: Vocabulary | None) -> list[dict[str, Any]]:
    """Return examples of the features with the heaviest tails, for a few layers, without those of first tokens."""
    if "examples" not in found or "total" not in found:
        return []
    top, kurtosis, position = found["examples"], found["total"]["kurtosis"], store.coordinates["position"].values
    layers = _layers(top)
    shown = []
    for i in sorted({0, len(layers) // 2, len(layers) - 1}):
        rows = top["row"].isel(layer=i).values
        order = np.argsort(-np.nan_to_num(kurtosis.isel(layer=i).values, nan=-np.inf), kind="stable")
        dims = [int(dim) for dim in order if position[rows[0, dim]] != 0][:SHOWN_DIMS]
        at = top.isel(layer=i, direction=dims)
        layer = None if layers[i] < 0 else int(layers[i])
        for dim, lines in zip(dims, _lines(store, found.site, layer, tuple(dims), at, words)):
            shown.append(
                {"name": f"layer {layers[i]}, dim {dim}" if layer is not None else f"dim {dim}", "html": lines}
            )
    return shown


def _lines(
    store: Store, site: str, layer: int | None, dims: tuple[int, ...], at: xr.Dataset, words: Vocabulary | None
) -> list[Markup]:
    found = examples.shown(store, site, layer, dims, at, count=5, context=14, words=words)
    return [Markup(examples.html(lines)) for lines in found]
