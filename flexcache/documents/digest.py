"""Digests of documents, so that a store is not resumed with other documents of the same number and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from flexcache.documents.sources.source import CorpusFile

DIGEST = "xxh3_128"
WHOLE = 1 << 30
"""Bytes up to which all files of a corpus are hashed; of larger corpora, as many bytes in evenly spaced blocks."""
BLOCK = 64 << 10


def digest_files(files: Sequence[CorpusFile]) -> str:
    """Return the XXH3-128 of the contents of files: of all bytes up to 1 GiB, or of a sample of that size."""
    sizes = [file.path.stat().st_size for file in files]
    share = min(1.0, WHOLE / max(1, sum(sizes)))
    hasher = xxhash.xxh3_128()
    for file, size in zip(files, sizes, strict=True):
        hasher.update(f"{size}:".encode())
        blocks = -(-size // BLOCK)
        with file.path.open("rb") as opened:
            for at in np.unique(np.linspace(0, max(0, blocks - 1), max(1, int(blocks * share))).astype(np.int64)):
                opened.seek(int(at) * BLOCK)
                hasher.update(opened.read(BLOCK))
    return hasher.hexdigest()


def update_batch(hasher: Any, batch: pa.RecordBatch) -> None:
    """Feed the values of a record batch to a hasher, independently of the layout of its buffers."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        hasher.update(f"{name}:".encode())
        _update(hasher, column)


def same_corpus(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return True if two descriptions fit one corpus; earlier versions described it without a digest."""
    both = before.get(DIGEST) and now.get(DIGEST)
    one, other = ({key: value for key, value in told.items() if both or key != DIGEST} for told in (before, now))
    return one == other


def _update(hasher: Any, array: pa.Array) -> None:
    kind = array.type
    if pa.types.is_dictionary(kind):
        _update(hasher, array.dictionary_decode())
        return
    hasher.update(np.packbits(np.asarray(array.is_valid())).tobytes())
    if pa.types.is_null(kind):
        return
    held = array.drop_null()
    if pa.types.is_struct(kind):
        for number, part in enumerate(held.flatten()):
            hasher.update(f"{kind.field(number).name}:".encode())
            _update(hasher, part)
    elif pa.types.is_fixed_size_list(kind):
        _update(hasher, held.flatten())
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hasher.update(np.asarray(pc.list_value_length(held)).astype("<i8").tobytes())
        _update(hasher, held.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        _update_bytes(hasher, held, np.int32)
    elif pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        _update_bytes(hasher, held, np.int64)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        hasher.update(np.ascontiguousarray(held.to_numpy(zero_copy_only=False)).tobytes())
    elif isinstance(kind, pa.BaseExtensionType):
        _update(hasher, held.storage)
    elif pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        _update(hasher, held.view(pa.int64() if kind.bit_width == 64 else pa.int32()))
    else:  # decimals, bytes of a fixed size, maps
        _update(hasher, pa.array([str(value) for value in held.to_pylist()], pa.string()))


def _update_bytes(hasher: Any, array: pa.Array, offset: type[np.integer]) -> None:
    hasher.update(np.asarray(pc.binary_length(array)).astype("<i8").tobytes())
    if not len(array):
        return
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, offset)[array.offset : array.offset + len(array) + 1]
    if data is not None:
        hasher.update(memoryview(data)[int(ends[0]) : int(ends[-1])])
