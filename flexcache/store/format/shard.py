"""Lay out one shard file: rows, then an index, as Zarr's ``sharding_indexed`` codec defines them.

A shard holds R rows of one site and layer. Its inner chunks span the feature dim and lie one after the other,
uncompressed, so the file is plain C-order rows followed by a footer, and row *i* begins at ``i * row_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np

INNER_CHUNK_BYTES = 1 << 20
MISSING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class ShardLayout:
    """Layout of the rows of an array in its shard files; pure arithmetic.

    Attributes
    ----------
    n_rows, shard_rows : int
        Rows of the whole array, and of a full shard, R: a power of two.
    row_bytes : int
        Bytes of one row.
    """

    n_rows: int
    shard_rows: int
    row_bytes: int

    @property
    def chunk_rows(self) -> int:
        """Rows of an inner chunk: the largest power of two of at most 1 MiB, at least one, at most R."""
        fitting = max(1, INNER_CHUNK_BYTES // self.row_bytes)
        return min(self.shard_rows, 1 << (fitting.bit_length() - 1))

    @property
    def n_shards(self) -> int:
        """Number of shards; the last one may be partial."""
        return -(-self.n_rows // self.shard_rows)

    def rows(self, shard: int) -> range:
        """Return the row numbers of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.n_rows))

    def row_span(self, shard: int) -> int:
        """Return the number of bytes of the rows of a shard, without padding and footer."""
        return len(self.rows(shard)) * self.row_bytes

    def padding(self, shard: int) -> int:
        """Return the number of bytes that fill up the last inner chunk."""
        return -len(self.rows(shard)) % self.chunk_rows * self.row_bytes

    def footer(self, shard: int) -> bytes:
        """Return the shard index: offset and length of every inner chunk, and the CRC32C of that table."""
        chunk_bytes = self.chunk_rows * self.row_bytes
        present = -(-len(self.rows(shard)) // self.chunk_rows)
        return index_bytes([chunk_bytes] * present, self.shard_rows // self.chunk_rows)

    def file_bytes(self, shard: int) -> int:
        """Return the size of an uncompressed shard file."""
        return self.row_span(shard) + self.padding(shard) + self._index_bytes

    def was_extended(self, shard: int, size: int) -> bool:
        """Return True if a file of *size* bytes can be this partial shard after an extension appended rows."""
        inner = self.chunk_rows * self.row_bytes
        fuller = self.file_bytes(shard) < size <= self.shard_rows * self.row_bytes + self._index_bytes
        return fuller and (size - self._index_bytes) % inner == 0

    @property
    def _index_bytes(self) -> int:
        return 16 * (self.shard_rows // self.chunk_rows) + 4


def index_bytes(lengths: list[int], n_chunks: int) -> bytes:
    """Return the index of a shard of *n_chunks* whose first chunks have these lengths in bytes, without gaps."""
    index = np.full((n_chunks, 2), MISSING, dtype="<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]]) if lengths else 0
    table = index.tobytes()
    return table + int(google_crc32c.value(table)).to_bytes(4, "little")


def shard_folder(array: str, layer: int | None) -> str:
    """Return the folder of the shards of an array or layer relative to the store, with a slash at its end."""
    return f"{array}/c/" if layer is None else f"{array}/c/{layer}/"


def shard_name(array: str, layer: int | None, shard: int) -> str:
    """Return the path of a shard file relative to the store."""
    return f"{shard_folder(array, layer)}{shard}/0"
