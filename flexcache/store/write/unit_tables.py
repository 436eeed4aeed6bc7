"""Build the lines that a unit adds to the tables: its sequences, its new documents, its coordinates."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.images.encoded import IMAGE, IMAGE_DIGEST
from flexcache.plan import UnitPlan, ranges
from flexcache.sequences import ENCODER_TOKENS, ROW_POSITIONS, TokenizedCorpus
from flexcache.store.format.schema import BEGINS, CONTEXT

SEGMENT_TYPES = {"documents": pa.int64(), "starts": pa.int32(), "places": pa.int32()}
"""Columns of packed documents: their numbers, first tokens, and offsets in a sequence."""


class UnitTables:
    """Lines of the tables for the rows of one unit, after *n_documents* lines of the table of documents.

    The last document of a plan that grows ends, for now, with the *n_rows* rows of the plan.

    *numbers*, int64 of shape (documents,), has the line of each document in that table, -1 for those not in an earlier
    unit; the lines of *new*, the documents of this unit that are in no earlier one, are filled in.
    """

    def __init__(
        self, unit: UnitPlan, corpus: TokenizedCorpus, numbers: np.ndarray, n_documents: int, n_rows: int
    ) -> None:
        self._unit, self._options, self._n_rows = unit, corpus.options, n_rows
        self._corpus = corpus
        self._segments = segments = corpus.segmentation.segments(unit.sequences)
        there, first = np.unique(segments.document, return_index=True)
        in_order = there[np.argsort(first)]
        self.new = in_order[numbers[in_order] < 0]
        numbers[self.new] = n_documents + np.arange(len(self.new))
        self._numbers = numbers
        self._lowest = int(there[0])
        self._table = corpus.read_documents(self._lowest, int(there[-1]) + 1).combine_chunks()
        tokens = self._list("tokens")
        self._begin, self._flat = tokens.offsets.to_numpy()[:-1], tokens.values.to_numpy(zero_copy_only=False)
        self._first = np.searchsorted(segments.sequence, np.arange(len(unit.sequences)))  # segment of each line
        self._before = np.cumsum(segments.rows) - segments.rows  # rows of the line in the segments before
        self._before -= self._before[self._first][segments.sequence]
        self._place_rows()

    def sequences(self) -> pa.Table:
        """Return the lines of ``sequences.parquet``."""
        unit, segments = self._unit, self._segments
        lengths = self._corpus.segmentation.lengths[unit.sequences].astype(np.int64)
        offsets = np.append(0, np.cumsum(lengths))
        origin = np.full(int(offsets[-1]), -1, np.int64)  # index of each token among those of the documents
        places = ranges(offsets[segments.sequence] + segments.offset, segments.length)
        origin[places] = ranges(self._begin[self._of] + segments.start, segments.length)
        columns = {
            "document": pa.array(self._numbers[segments.document[self._first]]),
            "unit": pa.array(np.full(len(lengths), unit.unit, np.int32)),
            "batch": pa.array(unit.batches),
            "start": pa.array(segments.start[self._first].astype(np.int32)),
            "tokens": _lists(offsets, pa.array(self._tokens(origin, offsets), pa.int32())),
            "keep_start": pa.array(self._keep_start()),
            "n_rows": pa.array(unit.n_rows),
            "row_start": pa.array(unit.row_start),
        }
        if self._options.choice is not None or self._options.packing is not None:
            columns["keep"] = self._keep()
        if self._options.packing is not None:
            segments_of = np.append(self._first, len(segments.sequence))
            parts = {"documents": self._numbers[segments.document], "starts": segments.start, "places": segments.offset}
            columns |= {
                name: _lists(segments_of, pa.array(values, SEGMENT_TYPES[name])) for name, values in parts.items()
            }
            if self._options.packing.isolate:
                ends = segments.offset + segments.length  # a segment begins where the one before it ends
                begins = np.append(0, ends[:-1])
                begins[self._first] = 0
                columns[BEGINS] = _lists(segments_of, pa.array(begins, pa.int32()))
        if self._of_images:  # each image is one sequence
            columns[IMAGE] = self._table.column(IMAGE).take(pa.array(self._of[self._first]))
        if self._options.decoder is not None:  # each document is a sequence
            columns[CONTEXT] = self._list(ENCODER_TOKENS).take(pa.array(self._of))
        for name in self._corpus.token_labels:
            columns[name] = _lists(offsets, self._list(name).values.take(pa.array(origin, mask=origin < 0)))
        return pa.table(columns)

    def documents(self) -> pa.Table:
        """Return the lines of ``documents.parquet`` for the documents that are not in an earlier unit."""
        segments, unit = self._segments, self._unit
        first = np.unique(segments.document, return_index=True)
        at = first[1][np.searchsorted(first[0], self.new)]
        line = segments.sequence[at]
        row_start = unit.row_start[line] - unit.skip[line] + self._before[at]
        images = [IMAGE] if self._of_images else []  # a label may have the same name
        inner = [
            name for name in ("tokens", ROW_POSITIONS, ENCODER_TOKENS, *images) if name in self._table.column_names
        ]
        inner += self._corpus.token_labels
        table = self._table.drop_columns(inner).take(pa.array(self.new - self._lowest))
        table = table.add_column(2, "n_tokens", pa.array(self._corpus.lengths[self.new], pa.int32()))
        table = table.append_column("row_start", pa.array(row_start))
        n_rows = np.minimum(self._corpus.rows[self.new], self._n_rows - row_start)
        return table.append_column("n_rows", pa.array(n_rows, pa.int64()))

    def coordinates(self) -> dict[str, np.ndarray]:
        """Return the coordinates of the rows by name."""
        document = self._numbers[self._segments.document[self._segment]]
        if self._options.rows == "mean":
            none = np.full(len(document), -1, np.int32)
            return {"token_id": none, "position": none, "document": document}
        token_id = self._flat[self._begin[self._of][self._segment] + self._position]
        return {"token_id": token_id, "position": self._position.astype(np.int32), "document": document}

    def _tokens(self, origin: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return the tokens of the sequences, including those between and before packed documents."""
        tokens, marks = self._flat[origin], self._corpus.packing_tokens
        if marks.separator is not None:
            tokens[origin < 0] = marks.separator
        if marks.bos is not None:
            added = np.flatnonzero(origin < 0) if self._options.isolated else offsets[:-1]
            tokens[added[origin[added] < 0]] = marks.bos
        return tokens

    @property
    def _of_images(self) -> bool:
        return IMAGE_DIGEST in self._table.column_names

    @property
    def _of(self) -> np.ndarray:
        """Line in the table of the document of each segment."""
        return self._segments.document - self._lowest

    def _place_rows(self) -> None:
        """Find the segment of each row, and its position in its document."""
        unit, segments = self._unit, self._segments
        skip, count = unit.skip[segments.sequence], unit.n_rows[segments.sequence]
        low = np.clip(skip - self._before, 0, segments.rows)
        high = np.clip(skip + count - self._before, 0, segments.rows)
        self._segment = np.repeat(np.arange(len(segments.sequence)), high - low)
        position = ranges(segments.first_row + low, high - low)
        if ROW_POSITIONS in self._table.column_names and self._options.rows != "mean":
            kept = self._list(ROW_POSITIONS)
            values = kept.values.to_numpy(zero_copy_only=False)
            position = values[kept.offsets.to_numpy()[:-1][self._of][self._segment] + position].astype(np.int64)
        self._position = position

    def _places(self) -> np.ndarray:
        """Return the offset of each row in its sequence."""
        return self._position - self._segments.start[self._segment] + self._segments.offset[self._segment]

    def _keep_start(self) -> np.ndarray:
        if self._options.rows == "mean":
            return np.zeros(len(self._unit.n_rows), np.int32)
        return self._places()[np.cumsum(self._unit.n_rows) - self._unit.n_rows].astype(np.int32)

    def _keep(self) -> pa.ListArray:
        if self._options.rows == "mean":  # of whole documents
            return self._list(ROW_POSITIONS).take(pa.array(self._of))
        offsets = np.append(0, np.cumsum(self._unit.n_rows, dtype=np.int64))
        return _lists(offsets, pa.array(self._places().astype(np.int32)))

    def _list(self, name: str) -> pa.ListArray:
        array = self._table.column(name).combine_chunks()
        return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
