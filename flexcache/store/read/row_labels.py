"""Labels of single tokens, one for each row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.errors import StoreError, nearest
from flexcache.plan import ranges
from flexcache.sequences.labels import SEQUENCE_COLUMNS
from flexcache.spec import CaptureSpec
from flexcache.store.format.schema import CONTEXT
from flexcache.store.storage.location import StoreLocation


def label_names(tokens: pa.Table, spec: CaptureSpec) -> tuple[str, ...]:
    """Return the names of the columns of ``sequences.parquet`` that hold a label for each token."""
    own = (*SEQUENCE_COLUMNS, *([CONTEXT] if spec.decoder else []))
    return tuple(name for name in tokens.column_names if name not in own)


def row_labels(tokens: pa.Table, spec: CaptureSpec, name: str, where: StoreLocation) -> pa.Array:
    """Return the label of the token of each row, from the sequences of a store and its spec.

    StoreError if the tokens have no such label, or rows are means over tokens.
    """
    names = label_names(tokens, spec)
    if name not in names:
        raise StoreError(
            f"the tokens have no label {name!r}",
            where=str(where),
            remedy=nearest(name, names) if names else "capture with token_labels",
        )
    if spec.rows == "mean":
        raise StoreError("rows are means over tokens, so they have no label of a token", where=str(where))
    pieces = []
    for chunk in tokens.to_batches():
        lists, counts = chunk.column(name), chunk.column("n_rows").to_numpy()
        begin = lists.offsets.to_numpy()[:-1].astype(np.int64)
        if "keep" in chunk.schema.names:
            keep = chunk.column("keep")
            places = np.repeat(begin, counts) + keep.flatten().to_numpy(zero_copy_only=False)
        else:
            places = ranges(begin + chunk.column("keep_start").to_numpy(), counts)
        pieces.append(lists.values.take(pa.array(places)))
    return pa.chunked_array(pieces, tokens.schema.field(name).type.value_type).combine_chunks()
