"""Options of the chat template, which turns messages into text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)

from flexcache.errors import ConfigError
from flexcache.validation import Options

NOT_VARIABLES = (
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)
"""Arguments of ``apply_chat_template`` that are no variables of a template, or have an option of their own."""


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _read_template(value: Any) -> Any:
    """Return a template as text: that of a file, unless it is the text of a template itself."""
    if not isinstance(value, str | Path) or _is_template(str(value)):
        return value
    text = _read_file(value, "a file with a chat template in Jinja")
    if not _is_template(text):
        raise _unreadable(value, "a file with a chat template in Jinja", "text without {{ or {%")
    return text


def _read_tools(value: Any) -> Any:
    """Return tools as a list of dicts, from a JSON file if its name is given."""
    if not isinstance(value, str | Path):
        return list(value) if isinstance(value, tuple) else value
    try:
        return json.loads(_read_file(value, "a JSON file with a list of tools"))
    except ValueError as error:
        raise _unreadable(value, "a JSON file with a list of tools", str(error)) from error


def _read_file(name: str | Path, expected: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise _unreadable(name, expected, getattr(error, "strerror", None) or str(error)) from error


def _unreadable(name: str | Path, expected: str, found: str) -> ConfigError:
    return ConfigError(
        "key 'chat' names a file that cannot be used", where=str(name)[:200], expected=expected, found=found
    )


def _read_kwargs(value: Any) -> Any:
    """Return the variables of a template as JSON has them; a date, as YAML reads it, is text."""
    if not isinstance(value, Mapping):
        return value
    if taken := [name for name in value if name in NOT_VARIABLES]:
        raise ConfigError(
            f"template_kwargs cannot set {taken[0]!r}: it is not a variable of the template",
            expected="variables that the template reads, such as enable_thinking",
            remedy="tools, template and add_generation_prompt are keys of chat, beside template_kwargs",
        )
    try:
        read: dict[str, Any] = json.loads(json.dumps(value, default=_date_text))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "template_kwargs holds what a file cannot hold", expected="text, numbers, lists, dicts", found=str(error)
        ) from error
    return read


def _date_text(value: Any) -> str:
    if isinstance(value, date):
        return str(value)
    raise TypeError(f"{type(value).__name__} {repr(value)[:60]}")


class ChatOptions(Options):
    """Options of the chat template that turns messages into text.

    A store keeps the text of *template* and the content of *tools*, not the names of their files.

    >>> ChatOptions(template_kwargs={"enable_thinking": False}).model_dump()
    {'template_kwargs': {'enable_thinking': False}}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: Annotated[str | None, BeforeValidator(_read_template), WithJsonSchema({"type": ["string", "null"]})] = (
        Field(None, description="a file with a chat template in Jinja, or its text, in place of the tokenizer's own")
    )
    template_kwargs: Annotated[dict[str, Any], BeforeValidator(_read_kwargs)] = Field(
        {}, description="variables that the template reads, such as enable_thinking"
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="end the text with the opening of an answer of the assistant; by default only for prompts that are"
        " completed",
    )
    tools: Annotated[
        list[dict[str, Any]] | None,
        BeforeValidator(_read_tools),
        WithJsonSchema({"type": ["array", "string", "null"]}),
    ] = Field(None, description="tools of the documents that have none of their own: JSON schemas, or a JSON file")

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit options that have their default, so that two equal sets of options have one form."""
        content: dict[str, Any] = handler(self)
        return {name: value for name, value in content.items() if value not in (None, {})}
