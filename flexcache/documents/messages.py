"""Chat messages in one form: role and content, and all that a message has beyond these as JSON.

A message of a role and a text is kept as it is. Any other is kept with its JSON in place of the content, after a zero
character, and the tools of a document as a message of that kind in front, so that batches of all chats have one type,
and the digests of plain chats are those of earlier versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flexcache.errors import DocumentsError

TOOLS = "tools"
"""The column of chats with the tools of each document."""
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PACKED = "\0"
NOT_TEXT = ("image", "images", "image_url", "audio", "input_audio", "video", "videos", "file", "files", "function_call")
"""Keys of a message, and types of a part of its content, that would change what a model reads and are not text."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a document, as a chat template reads them, and its tools, if it has any of its own."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_messages(value: Any, where: str, *, tools: Any = None, sparse: bool = False) -> list[dict[str, str]]:
    """Return the messages of one document, packed: a list of them, or the JSON text of one.

    Parameters
    ----------
    tools
        The tools of the document: a list of dicts, or the JSON text of one.
    sparse
        Nulls inside messages stand for what is not there, as in the columns of a table.

    Raises
    ------
    DocumentsError
        The value is not a list of messages, or a message has something that is not text, such as an image.

    Examples
    --------
    >>> read_messages('[{"role": "user", "content": "Hello"}]', "document 0")
    [{'role': 'user', 'content': 'Hello'}]
    >>> call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    >>> unpack_messages(read_messages([call], "document 0", tools=[{"name": "f"}]))
    Conversation(messages=[{'role': 'assistant', 'tool_calls': [{'name': 'f'}]}], tools=[{'name': 'f'}])
    """
    own, exact = _tools(tools, where, sparse), isinstance(value, str)
    if isinstance(value, str):
        value = _parse_json(value, where)
    value = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
    if not isinstance(value, list) or not value:
        raise _invalid(where, "no messages" if value in (None, []) else type(value).__name__)
    if isinstance(value[0], Mapping) and _is_packed(value[0]) and value[0]["content"].startswith(f"{PACKED}["):
        own, value = [dict(value[0])], value[1:]
    sparse = sparse and not exact
    return own + [_message(message, f"{where}, message {number}", sparse) for number, message in enumerate(value)]


def unpack_messages(messages: Sequence[Mapping[str, str]]) -> Conversation:
    """Return the conversation of a document from the form of `read_messages`."""
    read = [
        json.loads(message["content"][1:]) if message["content"].startswith(PACKED) else dict(message)
        for message in messages
    ]
    return Conversation(read[1:], read[0]) if isinstance(read[0], list) else Conversation(read)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, f"a str that is not JSON: {text[:60]!r}") from error


def _message(message: Any, where: str, sparse: bool) -> dict[str, str]:
    if isinstance(message, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in message):
        message = dict(message)  # a map of Arrow
    if not isinstance(message, Mapping):
        raise _invalid(where, type(message).__name__)
    held = {str(name): _plain(value, sparse) for name, value in message.items() if value is not None}
    role, content = held.get("role"), held.get("content")
    if not isinstance(role, str):
        raise _invalid(where, f"role: {repr(role)[:60]}" + (", from and value" if {"from", "value"} <= {*held} else ""))
    plain = content if isinstance(content, str) and held.keys() == {"role", "content"} else None
    if plain is not None and (not plain.startswith(PACKED) or _is_packed(held)):
        return {"role": role, "content": plain}
    if other := [name for name in NOT_TEXT if held.get(name)]:
        raise _not_text(where, f"{', '.join(other)} as well")
    _check_content(content, held, where)
    _check_calls(held.get("tool_calls"), where)
    try:
        return {"role": role, "content": PACKED + json.dumps(held, ensure_ascii=False)}
    except (TypeError, ValueError) as error:
        raise _invalid(where, str(error)) from error


def _tools(value: Any, where: str, sparse: bool) -> list[dict[str, str]]:
    """Return tools as a packed message, or nothing."""
    if isinstance(value, str):
        value, sparse = _parse_json(value, where) if value.strip() else None, False
    tools = _plain(value, sparse)
    if tools is None or tools == []:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DocumentsError(
            "tools that cannot be read",
            where=where,
            expected="a list of JSON schemas, or the JSON text of one",
            found=repr(value)[:60],
            remedy="if the column holds something else, rename it, or choose the labels:"
            f" flexcache.open_documents(…, labels=[{TOOLS!r}])",
        )
    return [{"role": TOOLS, "content": PACKED + json.dumps(tools, ensure_ascii=False)}]


def _is_packed(message: Mapping[str, Any]) -> bool:
    """Return True for a message, or the tools, as `read_messages` returns them; other texts can begin with a zero."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, str) or not content.startswith(PACKED):
        return False
    try:
        held = json.loads(content[1:])
    except (ValueError, RecursionError):
        return False
    if not isinstance(held, dict):
        return isinstance(held, list) and role == TOOLS
    text = held.get("content")
    plain = held.keys() == {"role", "content"} and isinstance(text, str) and not text.startswith(PACKED)
    return held.get("role") == role and not plain


def _check_content(content: Any, held: dict[str, Any], where: str) -> None:
    if content is None and not any(
        held.get(name) for name in ("tool_calls", "reasoning_content", "reasoning", "thinking")
    ):
        raise _invalid(where, "content: None" + (", and a refusal" if held.get("refusal") else ""))
    if isinstance(content, list) and content:
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            text = part.get(kind) if isinstance(part, dict) and kind in ("text", "thinking") else None
            if kind == "thinking" and isinstance(text, list):
                _check_content(text, held, where)
            elif not isinstance(text, str):
                raise _not_text(where, f"content: a part of type {kind!r}")
    elif not isinstance(content, str | None):
        raise _invalid(where, f"content: {repr(content)[:60]}")


def _check_calls(calls: Any, where: str) -> None:
    if calls is None:
        return
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(where, f"tool_calls: {repr(calls)[:60]}")
        if not isinstance(function.get("arguments"), str | dict | None):
            raise _invalid(where, f"arguments: {repr(function['arguments'])[:60]}")


def _plain(value: Any, sparse: bool) -> Any:
    """Return a value as JSON has it; with *sparse*, without the keys whose value is null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list) and value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # a map of Arrow
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, sparse) for key, inner in value.items() if not (sparse and inner is None)}
    return [_plain(inner, sparse) for inner in value] if isinstance(value, list | tuple) else value


def _invalid(where: str, found: str) -> DocumentsError:
    return DocumentsError(
        "messages that cannot be read",
        where=where,
        expected='a list of {"role": "user", "content": "…"}, with a text, or tool_calls of name and arguments',
        found=found,
        remedy="write role and content, or render the chat yourself and give the text",
    )


def _not_text(where: str, found: str) -> DocumentsError:
    return DocumentsError(
        "messages that cannot be read: only text can be",
        where=where,
        expected="a content of text, or a list of parts {type: text, text: …}",
        found=found,
        remedy="write each function_call as an entry of tool_calls"
        if found.startswith("function_call")
        else "leave these messages out, or say as text what they show",
    )
