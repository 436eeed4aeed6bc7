"""Documents of an encoder-decoder model: the text of the encoder, and the target of the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexcache.documents.arrow_types import is_list
from flexcache.documents.columns import content_of
from flexcache.errors import DocumentsError
from flexcache.options import DecoderInputs
from flexcache.sequences.encoded import Encoded, list_array
from flexcache.sequences.encoding import Tokenizer

TARGET, TARGET_TOKENS = "target", "target_tokens"


class TargetTokenizer:
    """A tokenizer of transformers in its mode for targets, which differs from that for texts in Marian and mBART."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Return the tokenizer's output for targets."""
        return self._tokenizer(text_target=texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def target_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer | None:
    """Return the tokenizer of targets; a plain function tokenizes them as it does texts."""
    return TargetTokenizer(tokenizer) if hasattr(tokenizer, "convert_tokens_to_ids") else tokenizer


def split_target(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Split documents into those of the encoder, with id and content, and those of the decoder, with all labels.

    The content of the decoder's documents is the target, as ``text`` or ``tokens``.

    Raises
    ------
    DocumentsError
        A document has no target, or one that is neither text nor tokens; the documents are chats or images.

    Examples
    --------
    >>> batch = pa.RecordBatch.from_pydict({"id": ["a"], "text": ["a cat"], "target": ["un chat"], "score": [1]})
    >>> [part.to_pylist() for part in split_target(batch)]
    [[{'id': 'a', 'text': 'a cat'}], [{'id': 'a', 'text': 'un chat', 'score': 1}]]
    """
    names = batch.schema.names
    content = content_of(batch)
    if content not in ("text", "tokens"):
        raise DocumentsError(
            f"{'a chat' if content == 'messages' else 'an image'} cannot have a target for a decoder",
            expected="documents with text or tokens, and a target",
            found=content,
            remedy="write the encoder's input as text",
        )
    there = [name for name in (TARGET, TARGET_TOKENS) if name in names]
    if len(there) != 1:
        raise DocumentsError(
            "the documents have both target and target_tokens" if there else "the documents have no target",
            where=f"document {batch.column('id')[0].as_py()!r}",
            expected="target, a text for the decoder to read, or target_tokens, a list of token ids",
            found=", ".join(names),
            remedy="leave one of them out"
            if there
            else "give every document a target, and keep it among the labels; to capture the encoder alone, pass"
            " model.get_encoder() as the model (side: encoder in a configuration)",
        )
    target = _target_column(batch, there[0])
    labels = [name for name in names[2:] if name != there[0]]
    kind = "text" if there[0] == TARGET else "tokens"
    return batch.select([0, 1]), pa.RecordBatch.from_arrays(
        [batch.column("id"), target, *(batch.column(name) for name in labels)], ["id", kind, *labels]
    )


def shift_right(encoded: Encoded, inputs: DecoderInputs) -> Encoded:
    """Return targets as the decoder reads them: after the start token, without the last token.

    The number of tokens stays the same. The choice and the labels of a token move with it; the start token is not
    chosen, and its labels are null. Targets that are given as the decoder reads them are returned unchanged.
    """
    if inputs.inputs == "as_given":
        return encoded
    begins = encoded.starts[encoded.lengths > 0]
    flat = np.roll(encoded.flat, 1)
    ends = (encoded.starts + encoded.lengths)[encoded.lengths > 0]
    flat[begins] = encoded.flat[ends - 1] if inputs.start == "last" else inputs.start
    characters, kept = encoded.characters, encoded.kept
    if characters is not None:
        characters = np.roll(characters, 1, axis=0)
        characters[begins] = 0
    if kept is not None:
        kept = np.roll(kept, 1)
        kept[begins] = False
    is_start = np.zeros(len(flat), bool)
    is_start[begins] = True
    before = pa.array(np.arange(len(flat)) - 1, mask=is_start)
    return replace(
        encoded,
        tokens=list_array(flat, encoded.lengths),
        characters=characters,
        kept=kept,
        labels={name: encoded.list_of(values.flatten().take(before)) for name, values in encoded.labels.items()},
    )


def _target_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return the targets as text or as a list<int32> array, without nulls."""
    array = batch.column(name)
    if array.null_count:
        at = pc.index(array.is_null(), True).as_py()
        raise DocumentsError(
            f"document {batch.column('id')[at].as_py()!r} has no {name}: it is null",
            expected="a target for the decoder to read",
            found="null",
            remedy="complete the document, or leave it out",
        )
    kind = array.type
    fits = is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type))
    if name == TARGET:
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    try:
        if fits:
            plain = array.cast(pa.string() if name == TARGET else pa.list_(pa.int32()))
            if name == TARGET or not plain.flatten().null_count:
                return plain
    except pa.ArrowInvalid:  # a number that is not a token id
        pass
    raise DocumentsError(
        f"column {name!r} does not hold targets",
        where=f"documents from {batch.column('id')[0].as_py()!r} on",
        expected="text" if name == TARGET else "lists of token ids",
        found=str(kind),
        remedy="write token ids as target_tokens, and text as target",
    )
