"""Chats rendered by a tokenizer's template, with the message that each part of the text belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexcache.errors import ConfigError, DocumentsError

MARK = "\u2e28flexcache\u2e29"
"""Placeholder for the content of a message, which shows what the template writes around it."""


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Attributes
    ----------
    text : str
    roles : list of str
        The role of each message.
    parts, contents : list of (start, stop)
        Characters of each message with what the template writes around it, and of its content alone; (0, 0) for the
        content of a system message that the template puts elsewhere.
    """

    text: str
    roles: list[str]
    parts: list[tuple[int, int]]
    contents: list[tuple[int, int]]


def check_template(tokenizer: Any) -> None:
    """Raise ConfigError if a tokenizer cannot render chats, or does not know where in the text its tokens are."""
    if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the documents are chats, but the tokenizer cannot render them",
            expected="a fast tokenizer of transformers with a chat template",
            found=f"{type(tokenizer).__name__}, without a chat template"
            if not getattr(tokenizer, "chat_template", None)
            else f"{type(tokenizer).__name__}, which is not fast",
            remedy="use the tokenizer of an instruction-tuned model, or set tokenizer.chat_template",
        )


def render_chat(tokenizer: Any, messages: list[dict[str, str]], name: str) -> Chat:
    """Return a chat as text, with the place of each message in it.

    The text of the first *n* messages must begin that of the first *n* + 1, and the content of a message must appear
    unchanged, or without the spaces around it. Both are checked.

    Raises
    ------
    DocumentsError
        The template raises an error, or renders the chat in another way.
    """
    text = _rendered(tokenizer, messages, name)
    parts, contents, at = [], [], 0
    for number, message in enumerate(messages):
        try:
            stop = len(_prefix(tokenizer, messages[: number + 1], text, name, number))
            marked = _rendered(tokenizer, [*messages[:number], {**message, "content": MARK}], name)
            content = _content(marked, text[:stop], message["content"], name, number)
        except DocumentsError:
            if message["role"] != "system" or number + 1 == len(messages):
                raise
            stop, content = at, (0, 0)  # templates may put it into the message that follows
        parts.append((at, stop))
        contents.append(content)
        at = stop
    return Chat(text, [message["role"] for message in messages], parts, contents)


def find_turns(chat: Chat, places: np.ndarray, generated: np.ndarray | None) -> np.ndarray:
    """Return the index of the message that each token belongs to, -1 for tokens of the template: int64, (tokens,).

    Parameters
    ----------
    places : ndarray of int, shape (tokens, 2)
        First character of each token and the one after its last.
    generated : ndarray of bool, shape (tokens,), or None
        Tokens that the template itself marks as the assistant's, including the end of its messages.
    """
    found = np.full(len(places), -1, np.int64)
    for number, (start, stop) in enumerate(chat.contents):
        found[(places[:, 0] < stop) & (places[:, 1] > start)] = number
    if generated is not None:
        ends = np.array([stop for _, stop in chat.parts])
        found[generated] = np.searchsorted(ends, places[generated, 0], side="right")
    return found


def generated_tokens(tokenizer: Any, messages: list[dict[str, str]], tokens: list[int]) -> np.ndarray | None:
    """Return True for each token inside ``{% generation %}``; None if the template does not use that block."""
    if "{% generation" not in str(tokenizer.chat_template) and "{%- generation" not in str(tokenizer.chat_template):
        return None
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return np.array(found["assistant_masks"], bool) if list(found["input_ids"]) == list(tokens) else None


def _rendered(tokenizer: Any, messages: list[dict[str, str]], name: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a Jinja template can raise any error
        raise DocumentsError(
            "the chat template rejects a document",
            where=f"document {name!r}, its first {len(messages)} messages",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="give the roles in the order that the template expects",
        ) from error


def _prefix(tokenizer: Any, messages: list[dict[str, str]], text: str, name: str, number: int) -> str:
    rendered = _rendered(tokenizer, messages, name)
    if not text.startswith(rendered):
        what = "does not render messages one after the other, so tokens cannot be assigned to messages"
        raise _unplaced(what, name, number, rendered[-60:], text[max(0, len(rendered) - 60) : len(rendered)])
    return rendered


def _content(marked: str, text: str, content: str, name: str, number: int) -> tuple[int, int]:
    before, mark, after = marked.partition(MARK)
    inside = text[len(before) : len(text) - len(after)]
    if not mark or not text.startswith(before) or not text.endswith(after) or inside.strip() != content.strip():
        raise _unplaced("changes the content of a message", name, number, content[:60], inside[:60])
    return len(before), len(text) - len(after)


def _unplaced(what: str, name: str, number: int, expected: str, found: str) -> DocumentsError:
    return DocumentsError(
        f"the chat template {what}",
        where=f"document {name!r}, message {number}",
        expected=repr(expected),
        found=repr(found),
        remedy="render the chat yourself, and give the text with spans of characters",
    )
