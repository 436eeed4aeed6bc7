"""flexcache stats: compute statistics of a store in one read, keep them as Zarr, and print a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import flexcache
from analysis.dataset import tokens
from analysis.survey import Survey, results_path, survey
from analysis.terminal_table import TerminalTable
from flexcache.errors import ConfigError
from flexcache.paths import output_folder, shown
from flexcache.store.format.model_record import adapters_text

if TYPE_CHECKING:
    from flexcache.site import Layers

Columns = dict[str, Any]
MEANING = {
    "norm": "mean length of a row",
    "rank": "effective rank, without first tokens",
    "largest": "largest magnitude",
    "massive": "dims with a massive activation",
    "cosine": "mean cosine of two rows, without first tokens",
    "rogue": "share of it that one dim carries",
    "CKA next": "debiased CKA with the next layer in the table",
}


def run(
    store_path: str | Path | flexcache.Store,
    site: str = "resid_post",
    *,
    by: Sequence[str] = ("layer", "position"),
    only: Sequence[str] | None = None,
    layers: Layers = "all",
    model: str | None = None,
    rows: int | None = None,
    similarity_rows: int | None = None,
    own_logits: bool = False,
    output: str | Path | None = None,
    console: Console | None = None,
    progress: bool = True,
    **options: Any,
) -> Survey:
    """Compute, save and print statistics.

    Parameters
    ----------
    model
        The checkpoint folder, for classes of tokens and the logit lens; by default the one that made the store, if it
        exists.
    rows
        Approximate number of rows for covariances.
    similarity_rows
        Approximate number of rows for similarity and lens.
    own_logits
        Load the whole model and run the sampled documents, so that the lens is compared with the model's own logits.
    output
        Folder for the results; ``stats`` in the working folder by default.
    **options
        Further options of `analysis.survey.survey`: *seed*, *scheduler*, *workers*.

    Other parameters, and errors, are those of `analysis.survey.survey`.
    """
    console, folder = console or Console(), output_folder("stats" if output is None else output)
    model = None if model is None else os.path.expanduser(model)
    store = store_path if isinstance(store_path, flexcache.Store) else flexcache.open(store_path)
    head = model
    if head is None and not only and site == "resid_post" and store.spec.rows != "mean":
        name = store.provenance.model_name
        whole = adapters_text(store.provenance.model) == ""  # an adapter may change the norm and the unembedding
        head = name if whole and Path(name, "config.json").exists() else None
    types = None
    if "token_type" in by:
        words = tokens.vocabulary(store, model)
        if words is None:
            raise ConfigError(
                "classes of tokens need the tokenizer of the model",
                where="--by token_type",
                remedy="give the checkpoint folder: --model FOLDER",
            )
        types = tokens.token_types(words)
    if own_logits:
        head = _load_model(store, head)
    found = survey(
        store,
        site,
        only=only,
        by=by,
        layers=layers,
        token_types=types,
        head=head,
        folder=folder,
        similarity_rows=similarity_rows,
        progress=progress,
        **options,
        **({} if rows is None else {"rows": rows}),
    )
    console.print(table(found))
    note = (
        "reused, since nothing changed" if found.reused else f"{found.provenance['rows_read']:,} rows, each read once"
    )
    path = shown(results_path(folder, site))
    console.print(f"results  {path}  ({note})", markup=False, highlight=False, soft_wrap=True)
    return found


def _load_model(store: flexcache.Store, name: str | None) -> Any:
    """Return the whole model in the dtype of the capture."""
    if name is None:
        raise ConfigError(
            "the model's own logits need the model",
            where="--own-logits",
            remedy="give the checkpoint folder: --model FOLDER",
        )
    dtype = next((record.fingerprint.get("compute_dtype") for record in store.ledger), None)
    return flexcache.ModelSource(name=name, loader="AutoModelForCausalLM", dtype=dtype or "auto").load()


def table(found: Survey) -> Table:
    """Return a table of the statistics with a line for each layer."""
    columns: Columns = {}
    if "total" in found:
        total = found["total"]
        columns["rows"] = total["n"].values
        columns["norm"] = total["norm_mean"].values
    if "pca" in found:
        columns["rank"] = found["pca"]["effective_rank"].values
    if "outliers" in found:
        outliers = found["outliers"]
        largest = abs(outliers["value"]).max(("part", "rank", "feature"))
        columns["largest"] = largest.values
        columns["massive"] = outliers["massive"].any(("part", "rank")).sum("feature").values
        columns["cosine"] = outliers["cosine"].sel(part="rest").values
        columns["rogue"] = outliers["rogue_share"].sel(part="rest").values
    if "similarity" in found:
        cka = found["similarity"]["cka"].values
        columns["CKA next"] = np.append(np.diagonal(cka, 1), np.nan)
    if "lens" in found:
        columns["lens"] = found["lens"]["kl_mean"].values
    layers = next(iter(found.results.values()))
    names = layers["layer"].values if "layer" in layers.coords else range(len(next(iter(columns.values()), ())))
    meaning = dict(MEANING)
    if "lens" in found:
        about = found["lens"].attrs
        reference, sample = about["reference"], about["sample"]
        meaning["lens"] = (
            f"no KL of the logit lens, because its reference is {reference}"
            if reference.startswith("missing")
            else f"KL of the logit lens from {reference}, nats, on {sample}"
        )
    caption = " · ".join(f"{name}: {meaning[name]}" for name in columns if name in meaning)
    shown = TerminalTable(title=found.site, title_justify="left", caption=caption, caption_justify="left")
    for name in ("layer", *columns):
        shown.add_column(name, justify="right")
    for i, layer in enumerate(names):
        cells = [number(values[i]) for values in columns.values()]
        shown.add_row("–" if layer < 0 else str(int(layer)), *cells)
    return shown


def number(value: Any) -> str:
    """Format a number with three digits, or a count in full."""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return "–" if not np.isfinite(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
