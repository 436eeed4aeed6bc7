"""A tokenized corpus on disk, so that a plan is made in bounded memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from flexcache.images.encoded import IMAGE, IMAGE_DIGEST
from flexcache.options import SequenceOptions
from flexcache.sequences.document_columns import ENCODER_TOKENS
from flexcache.sequences.packing import ContinuousPacking, IsolatedPacking, PackingTokens
from flexcache.sequences.segmentation import Segmentation, SlidingWindows, WholeDocuments

PART_BYTES = 64 << 20
ROW_POSITIONS = "positions of rows"
"""The column of a tokenized corpus with the positions of the tokens that become rows, if not all do."""


class TokenizedCorpus:
    """Tokenized documents on disk, in corpus order, with their lengths in memory (4 bytes a document).

    Attributes
    ----------
    options : SequenceOptions
    packing_tokens : PackingTokens
        The tokens between packed documents.
    token_labels : tuple of str
        Names of the columns with an entry for each token.
    truncated, skipped, rowless, doubled : int
        Documents truncated to the maximum length; empty ones left out; documents without rows left out; texts that
        begin or end with special tokens of their own, which are not added again.
    left_out : Counter
        Texts of messages that the chat template leaves out, by part.
    n_tokens : int
        Tokens of the documents so far.
    image_bytes : int
        Bytes of all encoded images; 0 for other documents.

    >>> import tempfile
    >>> corpus = TokenizedCorpus(Path(tempfile.mkdtemp()))
    >>> tokens = pa.array([[5, 6], [7]], pa.list_(pa.int32()))
    >>> corpus.append_documents(pa.RecordBatch.from_pydict({"id": ["a", "b"], "tokens": tokens}))
    >>> corpus.write_part()
    >>> corpus.lengths.tolist(), corpus.read_documents(1, 2).column("id").to_pylist()
    ([2, 1], ['b'])
    """

    def __init__(
        self, folder: Path, options: SequenceOptions | None = None, packing_tokens: PackingTokens | None = None
    ) -> None:
        self.folder = folder
        self.options = options or SequenceOptions()
        self.packing_tokens = packing_tokens or PackingTokens()
        self.truncated = self.skipped = self.rowless = self.doubled = 0
        self.left_out = Counter[str]()
        self.image_bytes = self.n_tokens = 0
        self.token_labels: tuple[str, ...] = ()
        self._hasher = xxhash.xxh3_128()
        self._lengths: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._encoder_lengths: list[np.ndarray] = []
        self._opened: list[np.ndarray] = []
        windows = self.options.windows
        self._windows = windows and SlidingWindows(*windows.sizes(self.options.max_length))
        self._starts = [0]
        self._pending: list[pa.RecordBatch] = []
        self._schemas: list[pa.Schema] = []
        self._segmented: tuple[int, Segmentation] | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int32, shape (documents,)."""
        return _joined(self._lengths)

    @property
    def rows(self) -> np.ndarray:
        """Rows of each document: int32, shape (documents,)."""
        return _joined(self._rows)

    @property
    def segmentation(self) -> Segmentation:
        """The sequences of the documents so far; documents that follow may lengthen the last one if it is packed."""
        count = len(self.lengths)
        if self._segmented is None or self._segmented[0] != count:
            self._segmented = count, self._segment_documents()
        return self._segmented[1]

    def _segment_documents(self) -> Segmentation:
        packing = self.options.packing
        if packing is not None:
            kind = IsolatedPacking if packing.isolate else ContinuousPacking
            size, opened = packing.size(self.options.max_length), np.concatenate(self._opened) if self._opened else None
            return kind(self.lengths, size, self.packing_tokens, opened)
        return self._windows or WholeDocuments(self.lengths, self.rows)

    @property
    def input_lengths(self) -> np.ndarray:
        """Tokens that the model reads of each sequence: int32, shape (sequences, 1).

        With an encoder and a decoder, shape (sequences, 2): the decoder's tokens, then the encoder's.
        """
        lengths = [self.segmentation.lengths]
        if self._encoder_lengths:
            lengths.append(_joined(self._encoder_lengths))
        return np.stack(lengths, axis=1)

    @property
    def digest(self) -> str:
        """XXH3-128 of ids and tokens in order, and of images: it identifies the corpus for this tokenizer."""
        return self._hasher.hexdigest()

    @property
    def schema(self) -> pa.Schema:
        """The columns of `read_documents`, in types that hold the values of every part."""
        return pa.unify_schemas(self._schemas, promote_options="permissive")

    def append_documents(self, batch: pa.RecordBatch, kept: np.ndarray | None = None) -> None:
        """Add documents, and write a part once enough are pending.

        Parameters
        ----------
        batch
            Columns ``id`` and ``tokens`` (list<int32>); `ENCODER_TOKENS` with an encoder and a decoder; ``image`` and
            its digest for images; labels.
        kept : ndarray of bool, shape (tokens,)
            True for each token that becomes a row, or is averaged into one; None if all do.
        """
        tokens = batch.column("tokens")
        lengths = np.diff(tokens.offsets.to_numpy()).astype(np.int32)
        rows = lengths
        if kept is not None:
            positions, rows = _row_positions(kept, lengths)
            batch = batch.append_column(ROW_POSITIONS, positions)
        if self._windows:
            self._windows.append_documents(lengths, kept)
        if self.packing_tokens.bos is not None and self.options.special_tokens == "auto":
            first = tokens.flatten().to_numpy(zero_copy_only=False)[np.cumsum(lengths, dtype=np.int64) - lengths]
            self._opened.append(first == self.packing_tokens.bos)
            self.doubled += int(self._opened[-1].sum())
        self._lengths.append(lengths)
        self.n_tokens += int(lengths.sum(dtype=np.int64))
        self._rows.append(np.ones_like(lengths) if self.options.rows == "mean" else rows)
        self._hasher.update("\0".join(batch.column("id").to_pylist()).encode())
        self._hash_tokens(tokens, lengths)
        if IMAGE_DIGEST in batch.schema.names:
            self._hasher.update("\0".join(batch.column(IMAGE_DIGEST).to_pylist()).encode())
            self.image_bytes += batch.column(IMAGE).nbytes
        if ENCODER_TOKENS in batch.schema.names:
            context = batch.column(ENCODER_TOKENS)
            self._encoder_lengths.append(np.diff(context.offsets.to_numpy()).astype(np.int32))
            self._hash_tokens(context, self._encoder_lengths[-1])
        self._pending.append(batch)
        if sum(part.nbytes for part in self._pending) > PART_BYTES:
            self.write_part()

    def write_part(self) -> None:
        """Write the pending documents as one part; call it after the last document."""
        if not self._pending:
            return
        schema = pa.unify_schemas([batch.schema for batch in self._pending], promote_options="permissive")
        table = pa.Table.from_batches([batch.cast(schema) for batch in self._pending])
        with (
            pa.OSFile(str(self._part_path(len(self._starts) - 1)), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as out,
        ):
            out.write_table(table)
        self._schemas.append(table.schema)
        self._starts.append(self._starts[-1] + len(table))
        self._pending.clear()

    def read_documents(self, start: int, stop: int) -> pa.Table:
        """Return documents *start* to *stop*, excluded, of the corpus order."""
        parts = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for part in range(first, len(self._starts) - 1):
            low, high = self._starts[part], self._starts[part + 1]
            if low >= stop:
                break
            with pa.memory_map(str(self._part_path(part))) as source:
                table = pa.ipc.open_file(source).read_all()
            parts.append(table.slice(max(0, start - low), min(stop, high) - max(start, low)).cast(self.schema))
        return pa.concat_tables(parts)

    def _hash_tokens(self, tokens: pa.ListArray, lengths: np.ndarray) -> None:
        self._hasher.update(lengths.tobytes())
        self._hasher.update(np.ascontiguousarray(tokens.flatten().to_numpy(zero_copy_only=False)).tobytes())

    def _part_path(self, number: int) -> Path:
        return self.folder / f"tokens-{number:05d}.arrow"


def _joined(batches: list[np.ndarray]) -> np.ndarray:
    """Return the lengths of all batches, and replace the batches by them."""
    if len(batches) != 1:
        batches[:] = [np.concatenate([np.zeros(0, np.int32), *batches])]
    return batches[0]


def _row_positions(kept: np.ndarray, lengths: np.ndarray) -> tuple[pa.ListArray, np.ndarray]:
    """Return the positions of kept tokens in their documents as a list<int32> array, and their number by document."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    places = np.flatnonzero(kept)
    document = np.searchsorted(starts, places, side="right") - 1
    offsets = np.append(0, np.cumsum(np.bincount(document, minlength=len(lengths)))).astype(np.int32)
    values = pa.array((places - starts[document]).astype(np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), values), np.diff(offsets).astype(np.int32)
