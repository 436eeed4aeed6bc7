"""Documents into token sequences, spooled to the disk in corpus order, so that a plan can be made in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from flexcache.documents.columns import content_of
from flexcache.errors import DocumentsError
from flexcache.images.encoded import IMAGE, IMAGE_DIGEST
from flexcache.options import SequenceOptions
from flexcache.sequences.choice import chosen, first_or_last
from flexcache.sequences.cuts import Cuts, Whole, Windowed
from flexcache.sequences.encoding import Encoded, Tokenizer, encode
from flexcache.sequences.labels import aligned, check_names, said
from flexcache.sequences.lengths import Positions, check_lengths, check_sequences, within_sequences
from flexcache.sequences.packed import Isolated, Marks, Packed, marks
from flexcache.sequences.targets import (
    SPOOLED,
    TARGET,
    TARGET_TOKENS,
    parted,
    shifted,
    shifted_choice,
    shifted_labels,
    target_tokenizer,
)

PART_BYTES = 64 << 20
KEPT = "places of kept tokens"
"""The column of a spool that has the places of the tokens that are rows, where not all are."""


class Corpus(Protocol):
    """Documents in batches: `flexcache.Documents`, or a part of them."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents in corpus order, with columns ``id``, ``text``, ``tokens`` or ``image``, and labels."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the corpus."""


class Spool:
    """Tokenized documents on disk, in corpus order, with their lengths in memory (4 bytes a document).

    Attributes
    ----------
    options : SequenceOptions
    marks : Marks
        What is between packed documents.
    token_labels : tuple of str
        The columns with an entry for each token.
    lengths : ndarray of int32, shape (documents,)
    rows : ndarray of int32, shape (documents,)
        Rows of each document.
    truncated, skipped, rowless : int
        Documents that were cut to the maximum length; empty ones, and such without rows, that were left out.
    image_bytes : int
        Of all encoded images; 0 where the documents are others.
    digest : str
        XXH3-128 of ids and tokens in order, and of images: what the corpus is, for this tokenizer.
    """

    def __init__(self, folder: Path, options: SequenceOptions | None = None, marks: Marks | None = None) -> None:
        self.folder = folder
        self.options = options or SequenceOptions()
        self.marks = marks or Marks()
        self.truncated = self.skipped = self.rowless = 0
        self.image_bytes = 0
        self.token_labels: tuple[str, ...] = ()
        self._hasher = xxhash.xxh3_128()
        self._lengths: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._encoder_lengths: list[np.ndarray] = []
        windows = self.options.windows
        self._windowed = windows and Windowed(*windows.sizes(self.options.max_length))
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
    def rows(self) -> np.ndarray:
        """Rows of each document, shape (documents,)."""
        if len(self._rows) != 1:
            self._rows = [np.concatenate([np.zeros(0, np.int32), *self._rows])]
        return self._rows[0]

    @cached_property
    def cuts(self) -> Cuts:
        """The sequences of all documents; to be asked for when all are there."""
        if self.options.packing is not None:
            kind = Isolated if self.options.packing.isolate else Packed
            return kind(self.lengths, self.options.packing.size(self.options.max_length), self.marks)
        return self._windowed or Whole(self.lengths, self.rows)

    @property
    def extents(self) -> np.ndarray:
        """Tokens of each sequence, of an encoder's and a decoder's those of the longer side: int32."""
        return self.cuts.lengths if self.options.decoder is None else self.sides.max(axis=1)

    @property
    def sides(self) -> np.ndarray:
        """Tokens of each sequence: int32, shape (sequences, 1); with an encoder, shape (sequences, 2), its own last."""
        return np.stack(
            [self.cuts.lengths, *([np.concatenate(self._encoder_lengths)] if self._encoder_lengths else [])], axis=1
        )

    @property
    def digest(self) -> str:
        """Hex digest of ids and tokens in order."""
        return self._hasher.hexdigest()

    @property
    def schema(self) -> pa.Schema:
        """The columns of `take`: those of all parts, in types that hold every part's values."""
        return pa.unify_schemas(self._schemas, promote_options="permissive")

    def append(self, batch: pa.RecordBatch, kept: np.ndarray | None = None) -> None:
        """Add documents with columns ``id`` and ``tokens`` (list of int32), maybe with what an encoder reads.

        Of images, also ``image`` and its digest.

        Parameters
        ----------
        kept : ndarray of bool, shape (tokens,)
            Which tokens are rows, or are averaged into one; None for all.
        """
        tokens = batch.column("tokens")
        lengths = np.diff(tokens.offsets.to_numpy()).astype(np.int32)
        rows = lengths
        if kept is not None:
            places, rows = _places(kept, lengths)
            batch = batch.append_column(KEPT, places)
        if self._windowed:
            self._windowed.append(lengths, kept)
        self._lengths.append(lengths)
        self._rows.append(np.ones_like(lengths) if self.options.rows == "mean" else rows)
        self._hasher.update("\0".join(batch.column("id").to_pylist()).encode())
        self._hasher.update(lengths.tobytes())
        self._hasher.update(np.ascontiguousarray(tokens.flatten().to_numpy(zero_copy_only=False)).tobytes())
        if IMAGE_DIGEST in batch.schema.names:
            self._hasher.update("\0".join(batch.column(IMAGE_DIGEST).to_pylist()).encode())
            self.image_bytes += batch.column(IMAGE).nbytes
        if SPOOLED in batch.schema.names:
            given = batch.column(SPOOLED)
            read = np.diff(given.offsets.to_numpy()).astype(np.int32)
            self._encoder_lengths.append(read)
            self._hasher.update(read.tobytes())
            self._hasher.update(np.ascontiguousarray(given.flatten().to_numpy(zero_copy_only=False)).tobytes())
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
    options: SequenceOptions,
    *,
    vocabulary: int | None = None,
    encoder_vocabulary: int | None = None,
    positions: Positions = (None, None),
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
    options
        Which tokens are rows, and how long documents become sequences. A truncated text keeps the closing special
        tokens of a Hugging Face tokenizer.
    vocabulary, encoder_vocabulary
        Number of token ids that the model knows, and that its encoder does beside a decoder; another id is refused
        here, before any forward.
    positions
        Most tokens of a sequence that the model has positions for, and of one that its encoder has beside a decoder;
        None where it reads any length.
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
        No documents, an empty one, one without the target that a decoder needs, texts without a tokenizer or tokens
        with one, an unknown token id, more tokens than positions; labels or spans that do not fit their documents.
    ConfigError
        See `SequenceOptions.check`.
    """
    options.check()
    check_sequences(options, positions[0])
    result = Spool(folder, options, None if options.packing is None else marks(options.packing, tokenizer))
    index, tokens_done = first_index, 0
    for batch in documents.batches():
        if index == first_index:
            check_names(batch, options, keep_text, (KEPT, SPOOLED))
        source_index = np.arange(index, index + len(batch), dtype=np.int64)
        index += len(batch)
        content, reads, context = batch, tokenizer, None
        if options.decoder is not None:
            given, content = parted(batch)
            context, reads = encode(given, tokenizer, options), target_tokenizer(tokenizer)
            _check_ids(batch, context.tokens, encoder_vocabulary)
            check_lengths(batch, context.lengths, positions[1])
        encoded = encode(content, reads, options)
        shortest = encoded.lengths if context is None else np.minimum(encoded.lengths, context.lengths)
        if len(blank := np.flatnonzero(shortest == 0)):
            if empty == "error":
                raise DocumentsError(
                    f"document {batch.column('id')[int(blank[0])].as_py()!r} has no tokens"
                    + ("" if context is None else ", or no tokens in its target"),
                    where=f"document {source_index[blank[0]]} of the corpus, counted from 0",
                    expected="at least one token",
                    remedy="remove it, or skip all such documents with empty_documents: skip",
                )
            result.skipped += len(blank)
        if content_of(batch) != IMAGE:  # whose tokens have no ids
            _check_ids(batch, encoded.tokens, vocabulary)
            check_lengths(batch, within_sequences(encoded.lengths, options), positions[0])
        kept = chosen(content, encoded, tokenizer, options)
        labels = said(encoded) | {name: aligned(content, encoded, name) for name in options.token_labels}
        if options.decoder is not None:  # a row goes by the token of the target that is read there
            kept = shifted_choice(kept, encoded, options.decoder)
            labels = {name: shifted_labels(values, encoded, options.decoder) for name, values in labels.items()}
            encoded = shifted(encoded, options.decoder)
        kept = first_or_last(kept, encoded.lengths, options.rows)
        result.token_labels = tuple(labels)
        record = _record(batch, encoded, source_index, keep_text, labels, context)
        some = shortest > 0
        if options.max_tokens is not None:
            some &= encoded.starts < options.max_tokens - tokens_done
        cut = encoded.truncated if context is None else encoded.truncated | context.truncated
        result.truncated += int(cut[some].sum())
        tokens_read = int(encoded.lengths[some].sum())
        if kept is not None:
            rowless = some & (np.add.reduceat(np.append(kept, 0), encoded.starts) == 0)
            result.rowless += int(rowless.sum())
            some &= ~rowless
        if not some.all():
            kept = None if kept is None else kept[np.repeat(some, encoded.lengths)]
            record = record.take(pa.array(np.flatnonzero(some)))
        tokens_done += tokens_read
        if len(record):
            result.append(record, kept)
            progress(index - first_index, tokens_done)
        if options.max_tokens is not None and tokens_done >= options.max_tokens:
            break
    result.flush()
    if not len(result.lengths):
        left_out = f", {result.skipped} of them empty" + (f", {result.rowless} without rows" if result.rowless else "")
        raise DocumentsError(
            "there are no documents",
            where=str(documents.describe().get("files", "the corpus")),
            expected="at least one document with at least one token",
            found=f"{index - first_index} documents{left_out}",
        )
    return result


def _places(kept: np.ndarray, lengths: np.ndarray) -> tuple[pa.ListArray, np.ndarray]:
    """Return the places of kept tokens in their documents as a list<int32> array, and their numbers."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    places = np.flatnonzero(kept)
    document = np.searchsorted(starts, places, side="right") - 1
    offsets = np.append(0, np.cumsum(np.bincount(document, minlength=len(lengths)))).astype(np.int32)
    values = pa.array((places - starts[document]).astype(np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), values), np.diff(offsets).astype(np.int32)


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


def _chat_columns(batch: pa.RecordBatch, encoded: Encoded, keep_text: bool) -> dict[str, pa.Array]:
    """Return the text of chats, or its hash, and the hash of their messages."""
    texts = [chat.text for chat in encoded.chats or ()]
    text = {"text": texts} if keep_text else {"text_xxh3_128": [xxhash.xxh3_128_hexdigest(t.encode()) for t in texts]}
    hashes = messages_digests(batch.column(1).to_pylist())
    return {name: pa.array(values) for name, values in {**text, "messages_xxh3_128": hashes}.items()}


def messages_digests(chats: list[list[dict[str, str]]]) -> list[str]:
    """Return the XXH3-128 of the messages of each chat."""
    return [
        xxhash.xxh3_128_hexdigest("\0".join(text for m in chat for text in (m["role"], m["content"])).encode())
        for chat in chats
    ]


def image_digests(images: pa.Array) -> list[str]:
    """Return the XXH3-128 of each encoded image."""
    return [xxhash.xxh3_128_hexdigest(image.as_buffer()) for image in images]


def _hashed(texts: pa.Array) -> pa.Array:
    """Return the XXH3-128 of each text, null for a label that is."""
    written = texts.to_pylist()
    return pa.array([None if t is None else xxhash.xxh3_128_hexdigest(t.encode()) for t in written], pa.string())


def _record(
    batch: pa.RecordBatch,
    encoded: Encoded,
    source_index: np.ndarray,
    keep_text: bool,
    labels: dict[str, pa.ListArray],
    context: Encoded | None,
) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        "id": batch.column("id"),
        "source_index": pa.array(source_index),
        "tokens": encoded.tokens,
    }
    if context is not None:
        columns[SPOOLED] = context.tokens
    texts = ("text",) if context is None else ("text", TARGET)
    content = content_of(batch)
    for name in batch.schema.names:
        if name == TARGET_TOKENS and context is not None:  # as tokens
            continue
        if name in texts and not keep_text and pa.types.is_string(batch.schema.field(name).type):
            columns[f"{name}_xxh3_128"] = _hashed(batch.column(name))
        elif name == content == IMAGE:
            columns |= {IMAGE: batch.column(IMAGE), IMAGE_DIGEST: pa.array(image_digests(batch.column(IMAGE)))}
        elif name == content == "messages":
            columns |= _chat_columns(batch, encoded, keep_text)
        elif name not in columns and name not in labels:
            columns[name] = batch.column(name)
    return pa.RecordBatch.from_pydict(columns | labels)
