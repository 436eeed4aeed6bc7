"""Scores of each head and losses by position from a store of repeated documents, without the model."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
from flexcache.errors import AnalysisError
from flexcache.store.read.store import Store

SCORES = ("induction", "previous_token")
LOSS = "loss"


@accept_store_path
def half_length(store: Store) -> int:
    """Return half the length of the documents, in tokens: the position at which they repeat themselves.

    ::

        half_length("induction.zarr")


    Raises
    ------
    AnalysisError
        Documents differ in length, have an odd length, or not all of their tokens are rows.
    """
    lengths = np.unique(store.documents.column("n_tokens").to_numpy())
    if len(lengths) != 1 or lengths[0] % 2 or store.spec.rows != "all":
        raise AnalysisError(
            "the documents do not repeat at a common position",
            where=str(store.path),
            expected="documents of one even length, and a row for every token",
            found=f"documents of {lengths.min()} to {lengths.max()} tokens, rows: {store.spec.rows}",
        )
    return int(lengths[0]) // 2


@accept_store_path
def head_scores(store: Store) -> xr.Dataset:
    """Return the means of ``induction`` and ``previous_token`` over the rows of second halves.

    ::

        head_scores("induction.zarr")["induction"].max()

    Returns
    -------
    Dataset with dims (layer, head); values from 0 to 1, shares of the attention of a head

    Raises
    ------
    AnalysisError
        See `half_length`.
    SiteError
        The store lacks one of the two.
    """
    half = half_length(store)
    for name in SCORES:
        store.layers(name)
    data = store.dataset()
    second = np.flatnonzero(data["position"].values >= half)
    means = {name: data[name].isel(token=second).mean("token").compute() for name in SCORES}
    return xr.Dataset(
        {name: mean.rename({f"feature_{name}": "head"}).reset_coords(drop=True) for name, mean in means.items()},
        attrs={"rows": len(second), "half": half},
    ).assign_coords(head=np.arange(means[SCORES[0]].sizes["feature_induction"]))


@accept_store_path
def loss_by_position(store: Store) -> xr.DataArray:
    """Return the mean loss of the token at each position over documents, in nats.

    ::

        loss_by_position("induction.zarr").sel(position=20)

    A row holds the loss of the prediction of the next token, so the value for a position comes from the row before it,
    and the first position has none.

    Returns
    -------
    DataArray with dim position, from 1; its attribute ``half`` is the position of the first repeated token

    Raises
    ------
    AnalysisError
        See `half_length`.
    SiteError
        The store has no ``loss``.
    """
    half = half_length(store)
    store.layers(LOSS)
    loss = store.dataset()[LOSS].squeeze(f"feature_{LOSS}", drop=True).compute()
    mean = loss.groupby("position").mean().isel(position=slice(0, -1))
    return mean.assign_coords(position=mean["position"].values + 1).assign_attrs(half=half)


def mean_losses(loss: xr.DataArray) -> dict[str, float]:
    """Return mean losses in nats of the first half, of the first repeated token (seam), and of the rest of the copy.

    The start of the copy cannot be predicted, so the seam is not part of the second half.

    >>> loss = xr.DataArray([3.0, 4.0, 1.0], {"position": [1, 2, 3]}, "position", attrs={"half": 2})
    >>> mean_losses(loss)
    {'first half': 3.0, 'seam': 4.0, 'second half': 1.0}
    """
    half, position = loss.attrs["half"], loss["position"].values
    parts = {"first half": position < half, "seam": position == half, "second half": position > half}
    return {name: float(loss.values[rows].mean()) for name, rows in parts.items()}


def save(scores: xr.Dataset, path: Path) -> Path:
    """Write a CSV file with a line for every layer and head: layer, head, induction, previous_token."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("layer", "head", *SCORES))
        for layer in scores["layer"].values:
            for head in scores["head"].values:
                at = scores.sel(layer=layer, head=head)
                table.writerow((int(layer), int(head), *(f"{float(at[name]):.6f}" for name in SCORES)))
    return path
