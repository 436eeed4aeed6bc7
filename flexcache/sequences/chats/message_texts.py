"""The texts inside the messages of a chat: contents, reasoning, names and arguments of tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

PARTS = ("template", "content", "reasoning", "tool_call", "tool_result")
"""The parts of a chat that a token can belong to."""
TOOL_ROLES = ("tool", "ipython", "function")
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class MessageText:
    """A text of a message.

    Attributes
    ----------
    message : int
    part : str
        One of `PARTS`.
    kind
        ``text``; ``name`` of a function; or ``key`` or ``value`` of arguments that are a dict, where numbers are
        values too.
    value
        The text, or a number, a boolean or None.
    arguments : int or None
        Number of the dict of arguments that contains it, counted over the chat.
    """

    message: int
    part: str
    kind: Literal["text", "name", "key", "value"]
    value: Any
    arguments: int | None = None

    @cached_property
    def text(self) -> str:
        """The value as text: as JSON, if it is none."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value)


Visit = Callable[[MessageText], Any]


def map_texts(messages: list[dict[str, Any]], visit: Visit) -> list[dict[str, Any]]:
    """Return messages in which each text is what *visit* returns for it; it is called in the same order each time.

    >>> map_texts([{"role": "user", "content": "Hello"}], lambda text: text.value.upper())
    [{'role': 'user', 'content': 'HELLO'}]
    """
    count = 0

    def mapped(number: int, message: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        result, tool = dict(message), message.get("role") in TOOL_ROLES
        for name, value in message.items():
            if name == "content":
                result[name] = _content(value, number, "tool_result" if tool else "content", visit)
            elif name in REASONING and isinstance(value, str):
                result[name] = visit(MessageText(number, "reasoning", "text", value))
            elif name == "name" and tool and isinstance(value, str):
                result[name] = visit(MessageText(number, "tool_result", "name", value))
            elif name == "tool_calls":
                calls = []
                for call in value:
                    calls.append(_call(call, number, count, visit))
                    count += 1
                result[name] = calls
        return result

    return [mapped(number, message) for number, message in enumerate(messages)]


def _content(value: Any, number: int, part: str, visit: Visit) -> Any:
    if isinstance(value, str):
        return visit(MessageText(number, part, "text", value))
    if isinstance(value, list):
        return [_part(item, number, part, visit) for item in value]
    return value


def _part(item: dict[str, Any], number: int, part: str, visit: Visit) -> dict[str, Any]:
    """Return a part of a content, ``{type: text, text: …}`` or ``{type: thinking, thinking: …}``."""
    if item.get("type") == "thinking":
        return {**item, "thinking": _content(item["thinking"], number, "reasoning", visit)}
    return {**item, "text": _content(item["text"], number, part, visit)}


def _call(call: Any, number: int, place: int, visit: Visit) -> Any:
    result = dict(call)
    for name, value in call.items():
        if name == "function" and isinstance(value, Mapping):
            result[name] = _call(value, number, place, visit)
        elif name == "arguments" and isinstance(value, Mapping):
            result[name] = _arguments(value, number, place, visit)
        elif name in ("name", "arguments") and isinstance(value, str):
            kind: Literal["name", "text"] = "name" if name == "name" else "text"
            result[name] = visit(MessageText(number, "tool_call", kind, value))
    return result


def _arguments(value: Any, number: int, place: int, visit: Visit) -> Any:
    if isinstance(value, Mapping):
        return {
            visit(MessageText(number, "tool_call", "key", name, place)): _arguments(inner, number, place, visit)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_arguments(inner, number, place, visit) for inner in value]
    return visit(MessageText(number, "tool_call", "value", value, place))
