"""Render messages by a chat template, in a form of the messages that the template takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flexcache.chat_options import ChatOptions
from flexcache.documents.messages import Conversation
from flexcache.errors import DocumentsError
from flexcache.sequences.chats.marks import template_literals


class Template:
    """Chat template of a tokenizer, with its variables and tools."""

    def __init__(self, tokenizer: Any, conversation: Conversation, options: ChatOptions) -> None:
        self._tokenizer, self._messages = tokenizer, conversation.messages
        tools = options.tools if conversation.tools is None else conversation.tools
        self._given: dict[str, Any] = {
            **options.template_kwargs,
            "tools": tools or None,
            "chat_template": options.template,
            "add_generation_prompt": bool(options.add_generation_prompt),
        }

    @property
    def source(self) -> str:
        """The text of the template."""
        return str(self._tokenizer.get_chat_template(self._given["chat_template"], self._given["tools"]))

    @property
    def literals(self) -> list[str]:
        """The texts that the template may look for in messages."""
        given = [value for value in self._given.values() if isinstance(value, str) and value != self.source]
        return [*template_literals(self.source), *filter(None, given)]

    def apply(self, messages: list[dict[str, Any]], **how: Any) -> Any:
        """Return what the tokenizer makes of messages."""
        return self._tokenizer.apply_chat_template(messages, **{**self._given, **how})

    def render_or_none(self, messages: list[dict[str, Any]]) -> str | None:
        """Return messages as text, None if the template raises an error."""
        try:
            return str(self.apply(messages, tokenize=False))
        except Exception:  # a Jinja template can raise any error
            return None

    def render_first(self, name: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the text of the first form of the messages that the template takes, and that form.

        A template that does not know lists of parts, or nothing else, may print or drop such contents; then another
        form is taken, if there is one that it writes.
        """
        reason: Exception | None = None
        dropped: tuple[str, list[dict[str, Any]]] | None = None
        for messages in _forms(self._messages):
            try:
                text = str(self.apply(messages, tokenize=False))
            except Exception as error:
                reason = reason or error
                continue
            contents = [message["content"] for message in messages if message.get("content")]
            if any(repr(content) in text for content in contents if isinstance(content, list)):
                continue
            kinds: Any = ([c for c in contents if isinstance(c, list) is of_parts] for of_parts in (False, True))
            if all(2 * sum(_is_shown(content, text) for content in kind) >= len(kind) for kind in kinds):
                return text, messages
            dropped = dropped or (text, messages)
        if dropped is not None:
            return dropped
        raise DocumentsError(
            "the chat template rejects a document",
            where=f"document {name!r}, its {len(self._messages)} messages",
            found=str(reason).splitlines()[0] if str(reason) else type(reason).__name__,
            remedy="give the roles in the order that the template expects",
        ) from reason


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield messages in the forms that templates differ about, the given one first."""
    seen: list[list[dict[str, Any]]] = []
    for fill, shape in itertools.product((False, True), (None, _as_text, _as_parts)):
        for convert in (None, _as_dict, _as_json):
            form = []
            for message in messages:
                made = {key: value for key, value in message.items() if value is not None}
                if fill:
                    made.setdefault("content", "")
                if shape and "content" in made:
                    made |= shape(made["content"])
                if convert and made.get("tool_calls"):
                    made["tool_calls"] = [convert(call) for call in made["tool_calls"]]
                form.append(made)
            if form not in seen:
                seen.append(form)
                yield form


def _as_text(content: Any) -> dict[str, Any]:
    """Return a content in parts as one text, and its reasoning apart from it."""
    if not isinstance(content, list):
        return {"content": content}
    thoughts = [part["thinking"] for part in content if part.get("type") == "thinking"]
    text = "".join(part["text"] for part in content if part.get("type") != "thinking")
    joined = "".join(_as_text(thought)["content"] for thought in thoughts)
    return {"content": text, **({"reasoning_content": joined} if thoughts else {})}


def _as_parts(content: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _is_shown(content: Any, text: str) -> bool:
    """Return True if a content, or the end of it, is in a rendering; also if it is empty."""
    end = str(_as_text(content)["content"]).split("</think>")[-1].strip()
    return not end or end in text or json.dumps(end, ensure_ascii=False)[1:-1] in text


def _as_dict(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are a dict."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _as_dict(dict(call["function"]))}
    try:
        read = json.loads(call.get("arguments", ""))
    except (TypeError, ValueError):
        return call
    return {**call, "arguments": read} if isinstance(read, dict) else call


def _as_json(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are JSON."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _as_json(dict(call["function"]))}
    given = call.get("arguments")
    return {**call, "arguments": json.dumps(given, ensure_ascii=False)} if isinstance(given, Mapping) else call
