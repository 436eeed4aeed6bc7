"""Text of token ids, and classes of tokens to group rows by."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexcache.errors import AnalysisError, ConfigError
from flexcache.identity.store_tokenizer import load_tokenizer
from flexcache.store.read.store import Store

TYPES = ("special", "word start", "word inside", "number", "punctuation", "space", "other")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The text of every token id.

    >>> Vocabulary(("the", " cat")).text(1)
    ' cat'

    Attributes
    ----------
    texts : tuple of str
        Tokens as they appear in text, with their leading space.
    special : frozenset of int
        Ids of special tokens, such as the end of a document.
    """

    texts: tuple[str, ...]
    special: frozenset[int] = frozenset()

    def text(self, token: int) -> str:
        """Return the text of a token; ``#7`` for an id that is not in the vocabulary."""
        return self.texts[token] if 0 <= token < len(self.texts) else f"#{token}"


@dataclass(frozen=True, eq=False)
class TokenTypes:
    """A class for every token id, to group rows by.

    >>> TokenTypes(("vowel", "other"), np.array([0, 1, 1])).names
    ('vowel', 'other')

    Attributes
    ----------
    names : tuple of str
    codes : ndarray of shape (vocabulary,)
        Indices into *names*; -1 for tokens in no class.
    """

    names: tuple[str, ...]
    codes: np.ndarray


def vocabulary(store: Store | None = None, tokenizer: Any = None) -> Vocabulary | None:
    """Return the vocabulary of a tokenizer, or of the model of a store; None if neither is available.

    ::

        words = tokens.vocabulary(store)
        words = tokens.vocabulary(tokenizer="path/to/model")

    Parameters
    ----------
    tokenizer
        A transformers tokenizer, or a folder or name to load one from; that needs transformers, and never runs remote
        code.

    Raises
    ------
    AnalysisError
        The given tokenizer cannot be loaded.
    """
    if tokenizer is None and store is not None:
        name = store.provenance.model_name
        if not Path(name).is_dir():
            return None
        try:
            tokenizer = load_tokenizer(name)
        except ConfigError:  # a store can be read without its model
            return None
    elif isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, AnalysisError)
    if tokenizer is None:
        return None
    texts = _texts(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    return Vocabulary(texts, frozenset(int(token) for token in getattr(tokenizer, "all_special_ids", ())))


def token_types(words: Vocabulary) -> TokenTypes:
    """Return the class of every token: special, word start, word inside, number, punctuation, space or other.

    >>> types = token_types(Vocabulary((" cat", "s", "7", "<eos>"), frozenset({3})))
    >>> [types.names[code] for code in types.codes]
    ['word start', 'word inside', 'number', 'special']
    """
    codes = np.array([TYPES.index(_type(text, i in words.special)) for i, text in enumerate(words.texts)], np.int64)
    return TokenTypes(TYPES, codes)


def _texts(tokens: list[str | None]) -> tuple[str, ...]:
    """Return tokens as they appear in text, from marks at word starts (Ġ, ▁) or inside words (##)."""
    pieces = [token or "" for token in tokens]
    if any(piece.startswith("Ġ") for piece in pieces):
        return tuple(_from_bytes(piece) for piece in pieces)
    if any(piece.startswith("▁") for piece in pieces):
        return tuple(piece.replace("▁", " ") for piece in pieces)
    if any(
        piece.startswith("##") for piece in pieces
    ):  # last, because other vocabularies have ## as a Markdown heading
        return tuple(piece[2:] if piece.startswith("##") else " " + piece for piece in pieces)
    return tuple(pieces)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE: printable bytes are themselves, others are 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


def _from_bytes(piece: str) -> str:
    if any(character not in _BYTES for character in piece):
        return piece
    return bytes(_BYTES[character] for character in piece).decode("utf-8", errors="replace")


def _type(text: str, special: bool) -> str:
    if special or not text:
        return "special"
    bare = text.strip()
    if not bare:
        return "space"
    kinds = {unicodedata.category(character)[0] for character in bare}
    if kinds <= {"L", "M"}:
        return "word start" if text[0].isspace() else "word inside"
    if kinds == {"N"}:
        return "number"
    return "punctuation" if kinds <= {"P", "S"} else "other"
