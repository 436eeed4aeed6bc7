"""Chats rendered by a template, with the message and the part that each token belongs to."""

from flexcache.sequences.chats.message_texts import PARTS
from flexcache.sequences.chats.rendering import (
    Chat,
    Span,
    check_template,
    find_tokens,
    generated_tokens,
    render_chat,
    render_text,
)

__all__ = ["PARTS", "Chat", "Span", "check_template", "find_tokens", "generated_tokens", "render_chat", "render_text"]
