"""Checks of token ids and sequence lengths against what a model can read."""

from __future__ import annotations

import numpy as np

from flexcache.errors import ConfigError, DocumentsError
from flexcache.options import SequenceOptions
from flexcache.sequences.encoded import Encoded

Positions = tuple[int | None, int | None]
"""Positions of a model, and of its encoder if it also has a decoder; None for any length."""


def check_sequence_length(options: SequenceOptions, positions: int | None) -> None:
    """Raise ConfigError if windows or packed sequences are longer than the model has positions."""
    length = None if options.isolated else _sequence_length(options)
    if positions is not None and length is not None and length > positions:
        raise ConfigError(
            "sequences are longer than the model can read",
            expected=f"at most {positions} tokens, which the model has positions for",
            found=f"{length} tokens",
            remedy=f"give windows or packing a length of at most {positions}",
        )


def check_document_lengths(encoded: Encoded, options: SequenceOptions, positions: int | None) -> None:
    """Raise DocumentsError if a document has more tokens in one sequence than the model has positions."""
    longest = _sequence_length(options)
    lengths = encoded.lengths if longest is None else np.minimum(encoded.lengths, longest)
    if positions is not None and (longer := np.flatnonzero(lengths > positions)).size:
        raise DocumentsError(
            f"document {encoded.document_id(longer[0])!r} is longer than the model can read",
            expected=f"at most {positions} tokens, which the model has positions for",
            found=f"{int(lengths[longer[0]])} tokens",
            remedy=f"truncate documents with max_length={positions}, or split them into windows",
        )


def check_token_ids(encoded: Encoded, vocabulary: int | None) -> None:
    """Raise DocumentsError if a token id is negative or not below *vocabulary*, by default 2³¹ − 1."""
    wrong = (encoded.flat < 0) | (encoded.flat >= (vocabulary or np.iinfo(np.int32).max))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise DocumentsError(
            f"document {encoded.document_id(encoded.document[at])!r} has a token id that the model does not know",
            expected=f"ids from 0 to {(vocabulary or 2**31) - 1}",
            found=str(int(encoded.flat[at])),
            remedy="use the tokenizer that belongs to the model",
        )


def _sequence_length(options: SequenceOptions) -> int | None:
    if options.windows is not None:
        return options.windows.sizes(options.max_length)[0]
    return None if options.packing is None else options.packing.size(options.max_length)
