"""The spec by which further documents of a store are tokenized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.sequences.special_tokens import DOUBLED, added_tokens
from flexcache.spec import CaptureSpec
from flexcache.store.format.schema import BEGINS, CONTEXT
from flexcache.store.read.open_store import OpenStore


def continued_spec(store: OpenStore, tokenizer: Any) -> CaptureSpec:
    """Return the spec of a store, with ``special_tokens: always`` if an earlier version of FlexCache wrote it so.

    That version added special tokens also to texts that had them. Its stores do not say so; their sequences show it,
    with two opening or two closing tokens, and further documents are tokenized in the same way.
    """
    spec = store.spec
    if spec.special_tokens != "auto" or store.plan.get(DOUBLED) or not hasattr(tokenizer, "convert_tokens_to_ids"):
        return spec
    added = added_tokens(tokenizer)
    firsts, lasts = _borders(store)
    twice = any(
        bool(side) and bool((pairs == outer).all(axis=1).any())
        for side, pairs, outer in ((added.prefix, firsts, added.prefix[:1]), (added.suffix, lasts, added.suffix[-1:]))
    )
    return spec.model_copy(update={"special_tokens": "always"}) if twice else spec


def _borders(store: OpenStore) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two and the last two tokens of whole documents: int, shape (documents, 2)."""
    table, spec = store.tokens, store.spec
    tokens: pa.ListArray = table.column("tokens" if spec.decoder is None else CONTEXT).combine_chunks()
    flat, offsets = tokens.values.to_numpy(zero_copy_only=False), tokens.offsets.to_numpy().astype(np.int64)
    if spec.packing is not None:
        begins = offsets[:-1]
        if BEGINS in table.column_names:
            inner: pa.ListArray = table.column(BEGINS).combine_chunks()
            counts = np.diff(inner.offsets.to_numpy())
            begins = np.repeat(begins, counts) + inner.flatten().to_numpy()
        return flat[begins[begins + 1 < len(flat), None] + np.arange(2)], np.zeros((0, 2), flat.dtype)
    long, start = np.diff(offsets) > 1, table.column("start").to_numpy()
    total = start + np.diff(offsets)
    whole = long & (total == store.documents["n_tokens"].to_numpy()[table.column("document").to_numpy()])
    if spec.whole and spec.max_length is not None:
        whole &= total < spec.max_length  # the end of a truncated text may be a closing token by chance
    if spec.decoder is not None:
        whole = long
    return flat[offsets[:-1][long & (start == 0), None] + np.arange(2)], flat[offsets[1:][whole, None] - [2, 1]]
