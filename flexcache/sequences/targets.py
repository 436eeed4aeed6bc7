"""Documents of two sides: what an encoder reads, and the target that a decoder reads while it attends to that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexcache.documents.columns import content_of
from flexcache.errors import DocumentsError
from flexcache.options import DecoderInputs
from flexcache.sequences.encoding import Encoded, Tokenizer, list_array

TARGET, TARGET_TOKENS = "target", "target_tokens"
SPOOLED = "tokens of the encoder"
"""The column of a spool that has what the encoder reads; no label is likely to be called so."""


class TargetTokenizer:
    """A tokenizer of transformers as it encodes targets, which some (Marian, mBART) do in another way than texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Return what the tokenizer gives for targets."""
        return self._tokenizer(text_target=texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def target_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer | None:
    """Return what encodes targets; a plain callable encodes them as it does texts."""
    return TargetTokenizer(tokenizer) if hasattr(tokenizer, "convert_tokens_to_ids") else tokenizer


def parted(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Return a batch of documents as the encoder's, of id and content, and as the decoder's, with all labels.

    In the decoder's, the target is the content: ``text``, or ``tokens``.

    Raises
    ------
    DocumentsError
        A document has no target, or one that is neither text nor tokens; the documents are chats.
    """
    names = batch.schema.names
    content = content_of(batch)
    if content not in ("text", "tokens"):
        raise DocumentsError(
            f"a decoder cannot read a target beside {'a chat' if content == 'messages' else 'an image'}",
            expected="documents with text or tokens, and a target",
            found=content,
            remedy="write what the encoder reads as text",
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
    given = _checked(batch, there[0])
    labels = [name for name in names[2:] if name != there[0]]
    side = "text" if there[0] == TARGET else "tokens"
    return batch.select([0, 1]), pa.RecordBatch.from_arrays(
        [batch.column("id"), given, *(batch.column(name) for name in labels)], ["id", side, *labels]
    )


def shifted(encoded: Encoded, inputs: DecoderInputs) -> Encoded:
    """Return targets as the decoder reads them: one place later, behind the token to begin with, without the last.

    The number of tokens stays. Targets that are given as the decoder reads them stay as they are.
    """
    if inputs.inputs == "as_given":
        return encoded
    begins = encoded.starts[encoded.lengths > 0]
    flat = np.roll(encoded.flat, 1)
    ends = (encoded.starts + encoded.lengths)[encoded.lengths > 0]
    flat[begins] = encoded.flat[ends - 1] if inputs.start == "last" else inputs.start
    characters = encoded.characters
    if characters is not None:
        characters = np.roll(characters, 1, axis=0)
        characters[begins] = 0
    return replace(encoded, tokens=list_array(flat, encoded.lengths), characters=characters)


def shifted_choice(kept: np.ndarray | None, encoded: Encoded, inputs: DecoderInputs) -> np.ndarray | None:
    """Return which tokens are chosen after `shifted`, by those of the target; that to begin with is not."""
    if kept is None or inputs.inputs == "as_given":
        return kept
    moved = np.roll(kept, 1)
    moved[encoded.starts[encoded.lengths > 0]] = False
    return moved


def shifted_labels(labels: pa.ListArray, encoded: Encoded, inputs: DecoderInputs) -> pa.ListArray:
    """Return the labels of tokens after `shifted`, by those of the target; that to begin with has null."""
    if inputs.inputs == "as_given":
        return labels
    places = np.arange(len(encoded.flat)) - 1
    none = np.zeros(len(places), bool)
    none[encoded.starts[encoded.lengths > 0]] = True
    return pa.ListArray.from_arrays(labels.offsets, labels.flatten().take(pa.array(places, mask=none)))


def _checked(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return the targets as text or as a list<int32> array, none of them null."""
    array = batch.column(name)
    if array.null_count:
        line = pc.index(array.is_null(), True).as_py()
        raise DocumentsError(
            f"document {batch.column('id')[line].as_py()!r} has no {name}: it is null",
            expected="a target for the decoder to read",
            found="null",
            remedy="complete the document, or leave it out",
        )
    kind = array.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    fits = is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type))
    if name == TARGET:
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    try:
        if fits:
            plain = array.cast(pa.string() if name == TARGET else pa.list_(pa.int32()))
            if name == TARGET or not plain.flatten().null_count:
                return plain
    except pa.ArrowInvalid:  # a number that is no token id
        pass
    raise DocumentsError(
        f"column {name!r} holds no targets",
        where=f"documents from {batch.column('id')[0].as_py()!r} on",
        expected="text" if name == TARGET else "lists of token ids",
        found=str(kind),
        remedy="write token ids as target_tokens, and text as target",
    )
