"""Checks that no sequence has more tokens than the model has positions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.errors import ConfigError, DocumentsError
from flexcache.options import SequenceOptions

Positions = tuple[int | None, int | None]
"""Of the model, and of its encoder beside a decoder; None where any length can be read."""


def check_sequences(options: SequenceOptions, positions: int | None) -> None:
    """Raise ConfigError if windows or packed sequences are longer than the model has positions."""
    length = None if options.isolated else _longest(options)
    if positions is not None and length is not None and length > positions:
        raise ConfigError(
            "sequences are to be longer than the model can read",
            expected=f"at most {positions} tokens, which the model has positions for",
            found=f"{length} tokens",
            remedy=f"give windows or packing a length of at most {positions}",
        )


def check_lengths(batch: pa.RecordBatch, lengths: np.ndarray, positions: int | None) -> None:
    """Raise DocumentsError if a document has more tokens than the model has positions."""
    if positions is not None and (longer := np.flatnonzero(lengths > positions)).size:
        raise DocumentsError(
            f"document {batch.column('id')[int(longer[0])].as_py()!r} is longer than the model can read",
            expected=f"at most {positions} tokens, which the model has positions for",
            found=f"{int(lengths[longer[0]])} tokens",
            remedy=f"truncate documents with max_length={positions}, or cut them with windows",
        )


def within_sequences(lengths: np.ndarray, options: SequenceOptions) -> np.ndarray:
    """Return how many tokens of each document come into one sequence, shape (documents,)."""
    longest = _longest(options)
    return lengths if longest is None else np.minimum(lengths, longest)


def _longest(options: SequenceOptions) -> int | None:
    if options.windows is not None:
        return options.windows.sizes(options.max_length)[0]
    return None if options.packing is None else options.packing.size(options.max_length)
