"""Documents into token sequences, spooled to the disk in corpus order, so that a plan can be made in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from flexcache.errors import DocumentsError
from flexcache.plan import ranges

Tokenizer = Callable[..., Any]
PART_BYTES = 64 << 20


class Corpus(Protocol):
    """Documents in batches: `flexcache.Documents`, or a part of them."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents in corpus order, with columns ``id``, ``text`` or ``tokens``, and labels."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the corpus."""


class Spool:
    """Tokenized documents on disk, in corpus order, with their lengths in memory (4 bytes a document).

    Attributes
    ----------
    lengths : ndarray of int32, shape (documents,)
    truncated, skipped : int
        Documents that were cut to the maximum length, and empty ones that were left out.
    digest : str
        XXH3-128 of ids and tokens in order: what the corpus is, for this tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truncated = 0
        self.skipped = 0
        self._hasher = xxhash.xxh3_128()
        self._lengths: list[np.ndarray] = []
        self._starts = [0]
        self._pending: list[pa.RecordBatch] = []
        self._schemas: list[pa.Schema] = []

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, shape (documents,)."""
        if len(self._lengths) != 1:
            self._lengths = [np.concatenate([np.zeros(0, np.int32), *self._lengths])]
        return self._lengths[0]

    @property
    def digest(self) -> str:
        """Hex digest of ids and tokens in order."""
        return self._hasher.hexdigest()

    @property
    def schema(self) -> pa.Schema:
        """The columns of `take`: those of all parts, in types that hold every part's values."""
        return pa.unify_schemas(self._schemas, promote_options="permissive")

    def append(self, batch: pa.RecordBatch) -> None:
        """Add documents with columns ``id`` and ``tokens`` (list of int32)."""
        tokens = batch.column("tokens")
        lengths = np.diff(tokens.offsets.to_numpy()).astype(np.int32)
        self._lengths.append(lengths)
        self._hasher.update("\0".join(batch.column("id").to_pylist()).encode())
        self._hasher.update(lengths.tobytes())
        self._hasher.update(np.ascontiguousarray(tokens.flatten().to_numpy(zero_copy_only=False)).tobytes())
        self._pending.append(batch)
        if sum(part.nbytes for part in self._pending) > PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one part."""
        if not self._pending:
            return
        table = pa.Table.from_batches(
            [
                batch.cast(pa.unify_schemas([b.schema for b in self._pending], promote_options="permissive"))
                for batch in self._pending
            ]
        )
        with (
            pa.OSFile(str(self._part(len(self._starts) - 1)), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as out,
        ):
            out.write_table(table)
        self._schemas.append(table.schema)
        self._starts.append(self._starts[-1] + len(table))
        self._pending.clear()

    def take(self, start: int, stop: int) -> pa.Table:
        """Return documents *start* … *stop* of the corpus order."""
        parts = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for part in range(first, len(self._starts) - 1):
            low, high = self._starts[part], self._starts[part + 1]
            if low >= stop:
                break
            with pa.memory_map(str(self._part(part))) as source:
                table = pa.ipc.open_file(source).read_all()
            parts.append(table.slice(max(0, start - low), min(stop, high) - max(start, low)).cast(self.schema))
        return pa.concat_tables(parts)

    def _part(self, number: int) -> Path:
        return self.folder / f"spool-{number:05d}.arrow"


def spool(
    documents: Corpus,
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    max_length: int | None = None,
    vocabulary: int | None = None,
    empty: Literal["error", "skip"] = "error",
    keep_text: bool = True,
    first_index: int = 0,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> Spool:
    """Tokenize a corpus once and write it into *folder*.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer, or any callable from a list of texts to a list of token lists. None where the
        documents are tokens already.
    max_length
        Tokens after which a document is truncated; a Hugging Face tokenizer keeps its closing special tokens.
    vocabulary
        Number of token ids that the model knows; another id is refused here, before any forward.
    empty
        What to do with a document that has no token.
    keep_text
        Whether texts are kept, or replaced by ``text_xxh3_128``.
    first_index
        The ``source_index`` of the first document, where others came before.
    progress
        Called with the documents and tokens done so far.

    Raises
    ------
    DocumentsError
        No documents, an empty one, texts without a tokenizer or tokens with one, an unknown token id.
    """
    result = Spool(folder)
    index, tokens_done = first_index, 0
    for batch in documents.batches():
        source_index = np.arange(index, index + len(batch), dtype=np.int64)
        index += len(batch)
        tokens, truncated = _tokens(batch, tokenizer, max_length)
        lengths = np.diff(tokens.offsets.to_numpy())
        if len(blank := np.flatnonzero(lengths == 0)):
            if empty == "error":
                raise DocumentsError(
                    f"document {batch.column('id')[int(blank[0])].as_py()!r} has no tokens",
                    where=f"document {source_index[blank[0]]} of the corpus, counted from 0",
                    expected="at least one token",
                    remedy="remove it, or skip all such documents with empty_documents: skip",
                )
            keep = np.flatnonzero(lengths)
            batch, tokens = batch.take(pa.array(keep)), tokens.take(pa.array(keep))
            source_index, truncated = source_index[keep], truncated[keep]
            result.skipped += len(blank)
        if not len(batch):
            continue
        _check_ids(batch, tokens, vocabulary)
        result.truncated += int(truncated.sum())
        result.append(_record(batch, tokens, source_index, keep_text))
        tokens_done += len(tokens.flatten())
        progress(index - first_index, tokens_done)
    result.flush()
    if not len(result.lengths):
        raise DocumentsError(
            "there are no documents",
            where=str(documents.describe().get("files", "the corpus")),
            expected="at least one document with at least one token",
            found=f"{index - first_index} documents, {result.skipped} of them empty",
        )
    return result


def _tokens(
    batch: pa.RecordBatch, tokenizer: Tokenizer | None, max_length: int | None
) -> tuple[pa.ListArray, np.ndarray]:
    """Return the batch's tokens as a list<int32> array without nulls, and which documents were truncated."""
    if "tokens" in batch.schema.names:
        given = batch.column("tokens")
        starts, lengths = given.offsets.to_numpy()[:-1], np.diff(given.offsets.to_numpy())
        kept = lengths if max_length is None else np.minimum(lengths, max_length)
        flat = given.values.to_numpy(zero_copy_only=False)[ranges(starts, kept)]
        return _list_array(flat, kept), kept < lengths
    if tokenizer is None:
        raise DocumentsError(
            "the documents are texts, but there is no tokenizer",
            expected="a tokenizer, or documents with tokens",
            remedy="pass the model's tokenizer; with tokenizer=None each document needs a list of tokens",
        )
    texts = batch.column("text").to_pylist()
    lists = list(_encode(tokenizer, texts))
    if len(lists) != len(texts):
        raise DocumentsError(
            "the tokenizer did not return one token list a text",
            expected=f"{len(texts)} lists",
            found=f"{len(lists)}",
        )
    truncated = np.array([max_length is not None and len(item) > max_length for item in lists], dtype=bool)
    for place in np.flatnonzero(truncated):
        lists[place] = _encode(tokenizer, [texts[place]], max_length)[0][:max_length]
    flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(item, np.int32) for item in lists)])
    return _list_array(flat, np.array([len(item) for item in lists])), truncated


def _list_array(flat: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))


def _encode(tokenizer: Tokenizer, texts: list[str], max_length: int | None = None) -> Any:
    if not hasattr(tokenizer, "convert_tokens_to_ids"):  # a plain callable
        return tokenizer(texts)
    options = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)[
        "input_ids"
    ]


def _check_ids(batch: pa.RecordBatch, tokens: pa.ListArray, vocabulary: int | None) -> None:
    flat = tokens.flatten().to_numpy(zero_copy_only=False)
    wrong = (flat < 0) | (flat >= (vocabulary or np.iinfo(np.int32).max))
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        line = int(np.searchsorted(tokens.offsets.to_numpy(), place, side="right")) - 1
        raise DocumentsError(
            f"document {batch.column('id')[line].as_py()!r} has a token id that the model does not know",
            expected=f"ids from 0 to {(vocabulary or 2**31) - 1}",
            found=str(int(flat[place])),
            remedy="use the tokenizer that belongs to the model",
        )


def _record(batch: pa.RecordBatch, tokens: pa.ListArray, source_index: np.ndarray, keep_text: bool) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        "id": batch.column("id"),
        "source_index": pa.array(source_index),
        "tokens": tokens,
    }
    for name in batch.schema.names:
        if name == "text" and not keep_text:
            texts = batch.column("text").to_pylist()
            columns["text_xxh3_128"] = pa.array([xxhash.xxh3_128_hexdigest(text.encode()) for text in texts])
        elif name not in columns:
            columns[name] = batch.column(name)
    return pa.RecordBatch.from_pydict(columns)
