"""Tokenize a corpus once, into a `TokenizedCorpus`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from flexcache.errors import DocumentsError
from flexcache.options import SequenceOptions
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.sequences.choice import choose_tokens, keep_one_token
from flexcache.sequences.document_columns import ENCODER_TOKENS, document_columns
from flexcache.sequences.encoded import Encoded
from flexcache.sequences.encoding import Tokenizer, encode_documents
from flexcache.sequences.labels import CHAT, PHASE, align_labels, check_label_names, phase_labels, role_labels
from flexcache.sequences.limits import Positions, check_document_lengths, check_sequence_length, check_token_ids
from flexcache.sequences.packing import packing_tokens
from flexcache.sequences.targets import shift_right, split_target, target_tokenizer
from flexcache.sequences.tokenized_corpus import ROW_POSITIONS, TokenizedCorpus


class Corpus(Protocol):
    """Documents in batches: `flexcache.Documents`, or a part of them."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents in corpus order, with columns ``id``, ``text``, ``tokens`` or ``image``, and labels."""

    def describe(self) -> dict[str, Any]:
        """Return the values that identify the corpus."""


def tokenize_corpus(
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
    chat_labels: Sequence[str] = CHAT,
    progress: ProgressCallback = ignore_progress,
) -> Iterator[TokenizedCorpus]:
    """Tokenize a corpus once and write it into *folder*; yield it after each batch of documents, and when it is whole.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer, or any function from a list of texts to a list of token lists. None if the documents
        are tokens already.
    options
        The tokens that become rows, and how documents become sequences. A truncated text keeps the closing special
        tokens of a Hugging Face tokenizer.
    vocabulary, encoder_vocabulary
        Number of token ids of the model, and of its encoder if it also has a decoder. Another id is an error here,
        before any forward.
    positions
        Most tokens of a sequence for the model, and for its encoder if it also has a decoder; None for any length.
    empty
        Raise an error for a document without tokens, or skip it.
    keep_text
        Keep texts, or replace them by ``text_xxh3_128``.
    first_index
        The ``source_index`` of the first document, if it continues an earlier corpus.
    chat_labels
        The labels of tokens that chats get, if not all: an older store that is extended has no ``part``.
    progress
        Called with the number of documents and tokens so far.

    Raises
    ------
    DocumentsError
        No documents, an empty one, one without the target that a decoder needs, texts without a tokenizer or tokens
        with one, an unknown token id, more tokens than positions; labels or spans that do not fit their documents.
    ConfigError
        See `SequenceOptions.check`.

    Examples
    --------
    >>> import tempfile
    >>> from flexcache import open_documents
    >>> documents = open_documents([{"tokens": [5, 6, 7]}, {"tokens": [8]}])
    >>> *_, corpus = tokenize_corpus(documents, None, Path(tempfile.mkdtemp()), SequenceOptions(rows="last"))
    >>> corpus.lengths.tolist(), corpus.rows.tolist()
    ([3, 1], [1, 1])
    """
    options.check()
    check_sequence_length(options, positions[0])
    packing = options.packing
    result = TokenizedCorpus(
        folder, options, None if packing is None else packing_tokens(packing, tokenizer, options.special_tokens)
    )
    index, tokens_done, roles = first_index, 0, set[str]()
    for batch in documents.batches():
        if index == first_index:
            check_label_names(batch, options, keep_text, (ROW_POSITIONS, ENCODER_TOKENS))
        source_index = np.arange(index, index + len(batch), dtype=np.int64)
        index += len(batch)
        content, context, content_tokenizer = batch, None, tokenizer
        if options.decoder is not None:
            source, content = split_target(batch)
            context, content_tokenizer = encode_documents(source, tokenizer, options), target_tokenizer(tokenizer)
            check_token_ids(context, encoder_vocabulary)
            check_document_lengths(context, options, positions[1])
        encoded = encode_documents(content, content_tokenizer, options)
        shortest = encoded.lengths if context is None else np.minimum(encoded.lengths, context.lengths)
        if (blank := np.flatnonzero(shortest == 0)).size:
            if empty == "error":
                raise DocumentsError(
                    f"document {encoded.document_id(blank[0])!r} has no tokens"
                    + ("" if context is None else ", or no tokens in its target"),
                    where=f"document {source_index[blank[0]]} of the corpus, counted from 0",
                    expected="at least one token",
                    remedy="remove it, or skip all such documents with empty_documents: skip",
                )
            result.skipped += len(blank)
        if encoded.content != "image":  # the tokens of an image have no ids
            check_token_ids(encoded, vocabulary)
            check_document_lengths(encoded, options, positions[0])
        for chat in encoded.chats or ():
            result.left_out.update(chat.left_out)
            roles |= {*chat.roles}
        encoded = _with_token_columns(encoded, tokenizer, options, chat_labels)
        result.token_labels = tuple(encoded.labels)
        record, kept = document_columns(batch, encoded, context, source_index, keep_text), encoded.kept
        some = shortest > 0
        if options.max_tokens is not None:
            some &= encoded.starts < options.max_tokens - tokens_done
        truncated = encoded.truncated if context is None else encoded.truncated | context.truncated
        result.truncated += int(truncated[some].sum())
        twice = [one.doubled for one in (encoded, context) if one is not None and one.doubled is not None]
        result.doubled += int(np.any(twice, axis=0)[some].sum()) if twice else 0
        tokens_done += int(encoded.lengths[some].sum())
        if kept is not None:
            rowless = some & (np.add.reduceat(np.append(kept, 0), encoded.starts) == 0)
            result.rowless += int(rowless.sum())
            some &= ~rowless
        if not some.all():
            kept = None if kept is None else kept[np.repeat(some, encoded.lengths)]
            record = record.take(pa.array(np.flatnonzero(some)))
        if len(record):
            result.append_documents(record, kept)
            progress(index - first_index, tokens_done)
            yield result
        if options.max_tokens is not None and tokens_done >= options.max_tokens:
            break
    result.write_part()
    if not len(result.lengths):
        counts = ((result.skipped, "empty"), (result.rowless, "without rows"))
        raise DocumentsError(
            "there are no documents" + (" with rows" if result.rowless else ""),
            where=str(documents.describe().get("files") or "the documents"),
            expected="at least one document with at least one token",
            found=", ".join(
                [f"{index - first_index} documents", *(f"{count} {what}" for count, what in counts if count)]
            ),
            remedy="choose other rows" + (f"; the messages have the roles {', '.join(sorted(roles))}" if roles else "")
            if result.rowless
            else None,
        )
    yield result


def _with_token_columns(
    encoded: Encoded, tokenizer: Tokenizer | None, options: SequenceOptions, chat_labels: Sequence[str]
) -> Encoded:
    """Return *encoded* as the model reads it, with the choice and the labels of its tokens."""
    kept = choose_tokens(encoded, tokenizer, options.choice)
    own = [name for name in chat_labels if name not in encoded.documents.schema.names[2:]]
    labels = {name: values for name, values in role_labels(encoded).items() if name in own}
    labels |= {name: align_labels(encoded, name) for name in options.token_labels}
    if options.decoding:
        labels[PHASE] = phase_labels(encoded)
    encoded = replace(encoded, kept=kept, labels=labels)
    if options.decoder is not None:
        encoded = shift_right(encoded, options.decoder)
    return replace(encoded, kept=keep_one_token(encoded.kept, encoded.lengths, options.rows))
