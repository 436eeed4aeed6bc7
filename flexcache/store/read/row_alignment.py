"""Align the rows of two stores by document and token position."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from flexcache.errors import AnalysisError
from flexcache.store.read.store import Store


def rows_in(store: Store, other: Store) -> np.ndarray:
    """Return, for each row of *other*, the number of the row of *store* with the same document id and position.

    ::

        same = flexcache.store.rows_in(store, other)
        store.read("resid_post", 8, same) - other.read("resid_post", 8)

    Returns
    -------
    ndarray of shape (other.n_rows,), int64

    Raises
    ------
    AnalysisError
        A document or position is not in *store*, or has another token there.
    """
    found = matching_rows(store, other)
    if (found < 0).any():
        row = int(np.flatnonzero(found < 0)[0])
        document = other.documents["id"][int(other.coordinates["document"].values[row])].as_py()
        raise AnalysisError(
            f"{int((found < 0).sum())} rows are not in the other store",
            where=str(store.path),
            found=f"the first is position {other.coordinates['position'].values[row]} of document {document!r}",
            remedy="compare stores that were captured from the same documents",
        )
    return found


def matching_rows(store: Store, other: Store) -> np.ndarray:
    """Return the rows as `rows_in` does, but -1 for rows that *store* does not have."""
    ids = store.documents["id"].combine_chunks()
    document = pc.index_in(other.documents["id"].combine_chunks(), value_set=ids)
    document = pc.fill_null(document, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    if not len(document) or not len(ids):
        raise AnalysisError("a store has no documents", where=str(other.path))
    coordinates = {name: np.asarray(v.values) for name, v in other.coordinates.items()}
    of = document[coordinates["document"]]
    own = {name: np.asarray(v.values) for name, v in store.coordinates.items()}
    there = (own["document"] << 32) + own["position"]  # ascending, as rows are
    wanted = (of << 32) + coordinates["position"]
    at = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    inside = (of >= 0) & (there[at] == wanted)
    found = np.where(inside, at, -1)
    differs = inside & (own["token_id"][np.maximum(found, 0)] != coordinates["token_id"])
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise AnalysisError(
            "the stores have different tokens at the same position",
            where=f"document {other.documents['id'][int(coordinates['document'][row])].as_py()!r}, "
            f"position {coordinates['position'][row]}",
            expected=f"token {own['token_id'][found[row]]} as in {store.path}",
            found=f"token {coordinates['token_id'][row]} in {other.path}",
            remedy="compare stores that were captured with the same tokenizer",
        )
    return found
