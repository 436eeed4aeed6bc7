"""The special tokens that a tokenizer puts around a text, and texts that have them already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DOUBLED = "doubled_documents"
"""Entry of a store's plan: the number of texts with special tokens of their own that were not added again."""


@dataclass(frozen=True)
class AddedTokens:
    """Ids of the tokens that a tokenizer puts in front of a text and behind it.

    >>> around = AddedTokens((1,), (2,))
    >>> around.count_doubled([1, 1, 7, 2]), around.count_doubled([1, 7, 2, 2]), around.count_doubled([1, 7, 2])
    ((1, 0), (0, 1), (0, 0))
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def count_doubled(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return how many tokens to remove at the front and at the end of *tokens*, which the tokenizer has added.

        The prefix is removed if the text itself begins with its first token, such as BOS or [CLS]; the suffix is
        removed if the text itself ends with its last token, such as EOS or [SEP]. The tokens of the text stay.
        """
        front, back = len(self.prefix), len(self.suffix)
        text = tokens[front : len(tokens) - back]
        if not len(text):
            return 0, 0
        return front if front and text[0] == self.prefix[0] else 0, back if back and text[-1] == self.suffix[-1] else 0


def added_tokens(tokenizer: Any) -> AddedTokens:
    """Return the tokens that a tokenizer of transformers adds to texts; none for a plain function.

    >>> added_tokens(lambda texts: [[1, *text.encode()] for text in texts])
    AddedTokens(prefix=(), suffix=())
    """
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return AddedTokens()
    [whole], [text] = (_encode(tokenizer, **options) for options in ({}, {"add_special_tokens": False}))
    starts = [at for at in range(len(whole) - len(text) + 1) if text and whole[at : at + len(text)] == text]
    if not starts:  # a text that is tokenized in another way without special tokens, or has no tokens at all
        return AddedTokens(tuple(whole[:1])) if whole[:1] == [tokenizer.bos_token_id] else AddedTokens()
    return AddedTokens(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(text) :]))


def doubled_notice(documents: int) -> str:
    """Return a line about texts with special tokens of their own.

    >>> doubled_notice(2)
    '2 texts begin or end with special tokens of their own, which are not added again (special_tokens: auto)'
    """
    texts = "1 text begins or ends" if documents == 1 else f"{documents:,} texts begin or end"
    return f"{texts} with special tokens of their own, which are not added again (special_tokens: auto)"


def _encode(tokenizer: Any, **options: Any) -> list[list[int]]:
    return [list(tokens) for tokens in tokenizer(["a"], verbose=False, **options)["input_ids"]]
