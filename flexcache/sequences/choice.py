"""The tokens of documents that become rows, by the rules of a `flexcache.options.Choice`."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from flexcache.errors import ConfigError, DocumentsError
from flexcache.options import Choice
from flexcache.sequences.chats import PARTS
from flexcache.sequences.encoded import Encoded
from flexcache.sequences.encoding import Tokenizer
from flexcache.sequences.token_columns import is_generated, span_tokens, token_values


def choose_tokens(encoded: Encoded, tokenizer: Tokenizer | None, choice: Choice | None) -> np.ndarray | None:
    """Return True for each token that all rules choose: bool, shape (tokens,), or None without rules.

    Raises
    ------
    DocumentsError
        A column that a rule reads is missing, or has another type, or does not fit a document.
    ConfigError
        Special tokens should be dropped, and the tokenizer does not name them.
    """
    if choice is None:
        return None
    kept = np.ones(len(encoded.flat), bool)
    if not choice.specials and encoded.content == "image":
        kept &= np.tile(_is_patch(tokenizer), len(encoded.lengths))
    elif not choice.specials:
        kept &= ~np.isin(encoded.flat, _special_ids(tokenizer))
    if choice.character_spans is not None:
        kept &= _in_spans(encoded, choice.character_spans, characters=True)
    if choice.token_spans is not None:
        kept &= _in_spans(encoded, choice.token_spans, characters=False)
    if choice.of_messages:
        kept &= _in_messages(encoded, choice)
    if choice.mask is not None:
        kept &= _in_mask(encoded, choice.mask)
    if choice.phases is not None:
        kept &= np.where(is_generated(encoded), "decode" in choice.phases, "prefill" in choice.phases)
    if choice.every is not None:
        before = np.append(0, np.cumsum(kept))  # kept tokens before each token
        kept &= (before[:-1] - before[encoded.starts][encoded.document]) % choice.every == 0
    if choice.fraction is not None:
        kept &= _draw(encoded, choice.fraction, choice.seed)
    return kept


def keep_one_token(kept: np.ndarray | None, lengths: np.ndarray, rows: str) -> np.ndarray | None:
    """Return *kept* reduced to the first or last token of each document, if *rows* is ``first`` or ``last``.

    >>> keep_one_token(np.array([False, True, True, True]), np.array([3, 1]), "last").tolist()
    [False, False, True, True]
    """
    if rows not in ("first", "last") or not lengths.sum():
        return kept
    places = np.arange(int(lengths.sum())) if kept is None else np.flatnonzero(kept)
    document = np.repeat(np.arange(len(lengths)), lengths)[places]
    change = np.flatnonzero(np.diff(document)) + 1
    edges = np.append(0, change) if rows == "first" else np.append(change, len(places)) - 1
    result = np.zeros(int(lengths.sum()), bool)
    result[places[edges[: len(places)]]] = True
    return result


def _in_spans(encoded: Encoded, column: str, *, characters: bool) -> np.ndarray:
    found = np.zeros(len(encoded.flat), bool)
    for tokens, _ in span_tokens(encoded, column, characters=characters):
        found[tokens] = True
    return found


def _in_messages(encoded: Encoded, choice: Choice) -> np.ndarray:
    """Return True for each token of the chosen parts, in messages of the chosen roles and turns."""
    if encoded.chats is None or encoded.turn is None or encoded.part is None:
        raise DocumentsError(
            "rows are chosen by roles, turns or parts, but the documents are not chats",
            expected="documents with messages",
            remedy="give messages, or choose tokens by spans or a mask",
        )
    parts = np.isin(encoded.part, [PARTS.index(part) for part in choice.parts or PARTS])
    if choice.roles is None and choice.turns is None:
        return np.asarray(parts)
    wanted = []
    for chat in encoded.chats:
        turns = {turn % len(chat.roles) for turn in choice.turns or () if -len(chat.roles) <= turn < len(chat.roles)}
        wanted.append(
            [
                (choice.roles is None or role in choice.roles) and (choice.turns is None or number in turns)
                for number, role in enumerate(chat.roles)
            ]
        )
    first = np.cumsum([0, *(len(chat.roles) for chat in encoded.chats)])[:-1]
    of_message = np.array([value for chat in wanted for value in chat], bool)
    found = encoded.turn >= 0
    found[found] = of_message[first[encoded.document[found]] + encoded.turn[found]]
    return found & parts


def _in_mask(encoded: Encoded, column: str) -> np.ndarray:
    values = token_values(encoded, column).to_pylist()
    wrong = [value for value in values if value not in (0, 1)]
    if wrong:
        found = repr(wrong[0])
        raise DocumentsError(f"column {column!r} is not a mask", expected="true and false, or 1 and 0", found=found)
    return np.array(values, bool)


def _draw(encoded: Encoded, fraction: float, seed: int) -> np.ndarray:
    """Return True for each token with a probability; the draw of a document depends on its id alone."""
    draws = [
        np.random.default_rng([seed, xxhash.xxh3_64_intdigest(name.encode())]).random(count)
        for name, count in zip(encoded.documents.column("id").to_pylist(), encoded.lengths.tolist())
    ]
    return np.concatenate([np.zeros(0), *draws]) < fraction


def _is_patch(image_input: Any) -> np.ndarray:
    """Return True for each token of an image that is a patch: bool, shape (tokens,)."""
    return np.asarray(image_input.patches.place(np.arange(image_input.patches.tokens))[0] >= 0)


def _special_ids(tokenizer: Tokenizer | None) -> list[int]:
    ids = getattr(tokenizer, "all_special_ids", None)
    if ids is None:
        raise ConfigError(
            "special tokens should be dropped, but it is not known which they are",
            expected="a tokenizer of transformers",
            found=type(tokenizer).__name__,
            remedy="give the model's tokenizer, or a mask column",
        )
    return list(ids)
