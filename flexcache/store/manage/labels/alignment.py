"""Align labels that are joined to a store with the tokens of its documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.errors import ConfigError, MismatchError, StoreError
from flexcache.model import ModelSource
from flexcache.plan import ranges
from flexcache.sequences import encode_documents
from flexcache.sequences.encoded import Encoded, list_array
from flexcache.sequences.labels import align_labels
from flexcache.sequences.targets import TARGET, shift_right, target_tokenizer
from flexcache.sequences.token_columns import is_spans
from flexcache.store.manage.continued_spec import continued_spec
from flexcache.store.read.open_store import OpenStore
from flexcache.store.storage.location import is_location


def align_with_tokens(
    store: OpenStore, documents: pa.Array, labels: pa.Table, tokenizer: Any = None
) -> dict[str, pa.ListArray]:
    """Return each column of *labels* as lists with an entry for each token of a document, as a capture does.

    A column holds lists with one entry for each token, or spans ``{start, end, label}``: of characters if the documents
    are texts, which are then tokenized again and compared with the stored tokens; otherwise of tokens.

    Parameters
    ----------
    documents : int64 array
        Numbers of the documents in the store, one for each line of *labels*.
    tokenizer
        The tokenizer of the capture, its folder or name; by default that of the store's model.

    Raises
    ------
    StoreError
        Rows are means over tokens, or the texts were not kept.
    MismatchError
        The tokenizer gives other tokens than those of the store.
    DocumentsError
        A column has another form, or does not fit a document.
    """
    spec = store.spec
    if spec.rows == "mean":
        raise StoreError("rows are means over tokens, so tokens cannot have labels", where=str(store.path))
    ids = store.documents["id"].combine_chunks().take(documents)
    plain = [labels[name].combine_chunks() for name in labels.column_names]
    by_characters = _content(store) == "text" and any(is_spans(array.type) for array in plain)
    if not by_characters and spec.decoder is None:
        lengths = store.documents["n_tokens"].to_numpy().astype(np.int64)[documents.to_numpy()]
        tokens = list_array(np.zeros(int(lengths.sum()), np.int32), lengths)
        batch = pa.RecordBatch.from_arrays([ids, tokens, *plain], ["id", "tokens", *labels.column_names])
        cut = (lengths == spec.max_length) & (_content(store) == "tokens")  # those that may have been truncated
        encoded = Encoded(batch, tokens, np.asarray(cut & spec.whole))
        return _aligned(encoded, labels.column_names)
    column = "text" if spec.decoder is None else TARGET
    if column not in store.documents.column_names:
        raise StoreError(
            "the store has no texts in which spans of characters could be found",
            where=str(store.path),
            expected=f"a column {column!r} of the documents",
            remedy="give lists with an entry for each token",
        )
    texts = store.documents[column].combine_chunks().take(documents)
    batch = pa.RecordBatch.from_arrays([ids, texts, *plain], ["id", "text", *labels.column_names])
    chats = "messages_xxh3_128" in store.documents.column_names
    tokenizer = _tokenizer(store, tokenizer)
    options = continued_spec(store, tokenizer).model_copy(
        update={"token_labels": tuple(labels.column_names), "choice": None, "chat": None}
    )
    if spec.decoder is not None:
        tokenizer = target_tokenizer(tokenizer)
    encoded = encode_documents(batch, tokenizer, options, special=False if chats else None)
    encoded = replace(encoded, labels=_aligned(encoded, labels.column_names))
    if spec.decoder is not None:
        encoded = shift_right(encoded, spec.decoder)
    _check_tokens(store, documents.to_numpy(), encoded)
    return encoded.labels


def _aligned(encoded: Encoded, names: Sequence[str]) -> dict[str, pa.ListArray]:
    return {name: align_labels(encoded, name) for name in names}


def _content(store: OpenStore) -> str:
    """Return the input of the documents: ``text`` also for rendered chats, ``image``, or ``tokens``."""
    names = store.documents.column_names
    if store.images:
        return "image"
    if "messages_xxh3_128" in names:
        return "text"
    columns = store.provenance.documents.get("columns") or {}
    return "text" if "text" in columns and "tokens" not in columns else "tokens"


def _tokenizer(store: OpenStore, given: Any) -> Any:
    if given is not None and not is_location(given):
        return given
    name = str(given or store.provenance.model_name)
    try:
        return ModelSource(name=name).tokenizer()
    except ConfigError as error:
        raise ConfigError(
            "the tokenizer of the store cannot be loaded, which spans of characters need",
            where=name,
            found=error.found or error.message,
            remedy="give the tokenizer of the capture, its folder or its name: tokenizer=… (--tokenizer)",
        ) from error


def _check_tokens(store: OpenStore, documents: np.ndarray, encoded: Encoded) -> None:
    """Raise MismatchError if documents have other tokens than in the store, as far as these are rows."""
    table = store.documents
    lengths, starts, counts = (
        table[name].to_numpy().astype(np.int64)[documents] for name in ("n_tokens", "row_start", "n_rows")
    )
    wrong = np.flatnonzero(lengths != encoded.lengths)
    if not len(wrong):
        rows, owner = ranges(starts, counts), np.repeat(np.arange(len(documents)), counts)
        position, token_id = (np.asarray(store.coordinates[name].values)[rows] for name in ("position", "token_id"))
        wrong = owner[encoded.flat[encoded.starts[owner] + position] != token_id]
    if len(wrong):
        raise MismatchError(
            "the tokenizer gives other tokens than those of the store",
            where=f"document {encoded.document_id(wrong[0])!r}",
            expected=f"{lengths[wrong[0]]} tokens, as captured",
            found=f"{encoded.lengths[wrong[0]]} tokens" + ("" if (lengths != encoded.lengths).any() else ", others"),
            remedy="give the tokenizer of the capture: tokenizer=… (--tokenizer)",
        )
