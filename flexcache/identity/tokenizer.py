"""The record of a tokenizer in a store."""

from __future__ import annotations

import json
from typing import Any

import xxhash

from flexcache.chat_options import ChatOptions

CHAT_TEMPLATE, DIGEST = "chat_template_xxh3_128", "xxh3_128"


def describe_tokenizer(tokenizer: Any, chat: bool = False, options: ChatOptions | None = None) -> dict[str, Any]:
    """Return the class of a tokenizer and a digest of its whole state; for chats also a digest of the template.

    >>> describe_tokenizer(None)
    {'class': None}
    """
    if chat:
        template = str((options and options.template) or getattr(tokenizer, "chat_template", None))
        return {**describe_tokenizer(tokenizer), CHAT_TEMPLATE: xxhash.xxh3_128_hexdigest(template.encode())}
    if tokenizer is None:
        return {"class": None}
    if hasattr(tokenizer, "tokens_of"):  # flexcache.images.input.ImageInput
        described: dict[str, Any] = tokenizer.describe()
        return described
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # padding and truncation are settings of the last call, not of the tokenizer
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        text = json.dumps(state, sort_keys=True)
    elif hasattr(tokenizer, "get_vocab"):
        text = json.dumps([tokenizer.get_vocab(), str(tokenizer.special_tokens_map)], sort_keys=True)
    else:
        return {"class": getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)}
    return {"class": type(tokenizer).__name__, DIGEST: xxhash.xxh3_128_hexdigest(text.encode())}
