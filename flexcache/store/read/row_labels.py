"""Labels of single tokens, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from flexcache.errors import StoreError, nearest
from flexcache.plan import ranges
from flexcache.sequences.labels import SEQUENCE_COLUMNS
from flexcache.store.format.schema import CONTEXT

if TYPE_CHECKING:
    from flexcache.store.read.store import Store


def label_names(store: Store) -> tuple[str, ...]:
    """Return the names of the columns with a label for each token."""
    own = (*SEQUENCE_COLUMNS, *([CONTEXT] if store.spec.get("decoder") else []))
    return tuple(name for name in store.tokens.column_names if name not in own)


def row_labels(store: Store, name: str) -> pa.Array:
    """Return the label of each row's token.

    Raises
    ------
    StoreError
        The tokens have no such label, or rows are means.
    """
    names = label_names(store)
    if name not in names:
        raise StoreError(
            f"the tokens have no label {name!r}",
            where=str(store.path),
            remedy=nearest(name, names) if names else "capture with token_labels",
        )
    if store.spec.get("rows") == "mean":
        raise StoreError("a mean of tokens has no label of a token", where=str(store.path))
    pieces = []
    for chunk in store.tokens.to_batches():
        lists, counts = chunk.column(name), chunk.column("n_rows").to_numpy()
        begin = lists.offsets.to_numpy()[:-1].astype(np.int64)
        if "keep" in chunk.schema.names:
            keep = chunk.column("keep")
            places = np.repeat(begin, counts) + keep.flatten().to_numpy(zero_copy_only=False)
        else:
            places = ranges(begin + chunk.column("keep_start").to_numpy(), counts)
        pieces.append(lists.values.take(pa.array(places)))
    return pa.chunked_array(pieces, store.tokens.schema.field(name).type.value_type).combine_chunks()
