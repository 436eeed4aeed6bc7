"""Chat messages in one form: a list of role and content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from flexcache.errors import DocumentsError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
KEYS = ("role", "content")


def read_messages(value: Any, where: str) -> list[dict[str, str]]:
    """Return the messages of one document: a list of them, or the JSON text of one.

    Raises
    ------
    DocumentsError
        The value is not a list of messages, or a message has more than a role and a text.

    Examples
    --------
    >>> read_messages('[{"role": "user", "content": "Hello"}]', "document 0")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(value, str):
        value = _parse_json(value, where)
    value = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
    if not isinstance(value, list) or not value:
        raise _invalid(where, "no messages" if value in (None, []) else type(value).__name__)
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, f"a str that is not JSON: {text[:60]!r}") from error


def _message(message: Any, where: str) -> dict[str, str]:
    if isinstance(message, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in message):
        message = dict(message)  # a map of Arrow
    if not isinstance(message, Mapping):
        raise _invalid(where, type(message).__name__)
    more = [str(name) for name, value in message.items() if name not in KEYS and value is not None]
    if more:
        raise _invalid(where, f"{', '.join(more)} as well")
    for name in KEYS:
        if not isinstance(message.get(name), str):
            raise _invalid(where, f"{name}: {repr(message.get(name))[:60]}")
    return {name: message[name] for name in KEYS}


def _invalid(where: str, found: str) -> DocumentsError:
    return DocumentsError(
        "messages that cannot be read",
        where=where,
        expected='a list of {"role": "user", "content": "…"}, both text, and nothing else',
        found=found,
        remedy="give tools, images and the like as text, or render the chat yourself and give the text",
    )
