"""Chats through a tokenizer's template: the text, and whose each part of it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexcache.errors import ConfigError, DocumentsError

MARK = "\u2e28flexcache\u2e29"
"""Stands for the content of a message, to see what the template puts around it."""


@dataclass(frozen=True)
class Chat:
    """A chat as text.

    Attributes
    ----------
    text : str
    roles : list of str
        Of each message.
    parts, contents : list of (start, stop)
        Characters of each message with what the template puts around it, and of its content alone; (0, 0) for the
        content of a system message that the template puts elsewhere.
    """

    text: str
    roles: list[str]
    parts: list[tuple[int, int]]
    contents: list[tuple[int, int]]


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot render chats, or does not know where in the text its tokens are.

    Raises
    ------
    ConfigError
    """
    if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the documents are chats, and the tokenizer cannot render them",
            expected="a fast tokenizer of transformers with a chat template",
            found=f"{type(tokenizer).__name__}, without a chat template"
            if not getattr(tokenizer, "chat_template", None)
            else f"{type(tokenizer).__name__}, which is not fast",
            remedy="take the tokenizer of an instruction-tuned model, or set tokenizer.chat_template",
        )


def render(tokenizer: Any, messages: list[dict[str, str]], name: str) -> Chat:
    """Return a chat as text, with the place of each message in it.

    The first *n* messages must be rendered as the beginning of what *n* + 1 are, and a message's content as it is, or
    without the space around it; both are checked.

    Raises
    ------
    DocumentsError
        The template refuses the chat, or renders it otherwise.
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


def turns(chat: Chat, places: np.ndarray, generated: np.ndarray | None) -> np.ndarray:
    """Return the number of the message that each token belongs to, -1 for those of the template.

    Parameters
    ----------
    places : ndarray of int, shape (tokens, 2)
        First character of each token and the one after its last.
    generated : ndarray of bool, shape (tokens,), or None
        Tokens that the template itself says are the assistant's, with what ends its messages.
    """
    found = np.full(len(places), -1, np.int64)
    for number, (start, stop) in enumerate(chat.contents):
        found[(places[:, 0] < stop) & (places[:, 1] > start)] = number
    if generated is not None:
        ends = np.array([stop for _, stop in chat.parts])
        found[generated] = np.searchsorted(ends, places[generated, 0], side="right")
    return found


def generated(tokenizer: Any, messages: list[dict[str, str]], tokens: list[int]) -> np.ndarray | None:
    """Return which tokens a template with ``{% generation %}`` says are the assistant's; None of another template."""
    if "{% generation" not in str(tokenizer.chat_template) and "{%- generation" not in str(tokenizer.chat_template):
        return None
    told = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return np.array(told["assistant_masks"], bool) if list(told["input_ids"]) == list(tokens) else None


def _rendered(tokenizer: Any, messages: list[dict[str, str]], name: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template of Jinja raises
        raise DocumentsError(
            "the chat template refuses a document",
            where=f"document {name!r}, its first {len(messages)} messages",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="give the roles in the order that the template expects",
        ) from error


def _prefix(tokenizer: Any, messages: list[dict[str, str]], text: str, name: str, number: int) -> str:
    rendered = _rendered(tokenizer, messages, name)
    if not text.startswith(rendered):
        raise DocumentsError(
            "the chat template does not render messages one after the other, so that it is not known whose a token is",
            where=f"document {name!r}, message {number}",
            expected=repr(rendered[-60:]),
            found=repr(text[max(0, len(rendered) - 60) : len(rendered)]),
            remedy="render the chat yourself, and give the text with spans of characters",
        )
    return rendered


def _content(marked: str, text: str, content: str, name: str, number: int) -> tuple[int, int]:
    before, mark, after = marked.partition(MARK)
    inside = text[len(before) : len(text) - len(after)]
    if not mark or not text.startswith(before) or not text.endswith(after) or inside.strip() != content.strip():
        raise DocumentsError(
            "the chat template changes what a message says",
            where=f"document {name!r}, message {number}",
            expected=repr(content[:60]),
            found=repr(inside[:60]),
            remedy="render the chat yourself, and give the text with spans of characters",
        )
    return len(before), len(text) - len(after)
