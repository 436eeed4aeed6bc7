"""Chats rendered once by a tokenizer's template, with the message and the part that each token belongs to.

`flexcache.sequences.chats.marks` finds the characters of each text. Everything else that the template writes is the
part ``template``, which belongs to no message, unless it is inside ``{% generation %}``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexcache.chat_options import ChatOptions
from flexcache.documents.messages import Conversation
from flexcache.errors import ConfigError, DocumentsError
from flexcache.sequences.chats.marks import Found, find_texts
from flexcache.sequences.chats.message_texts import PARTS, MessageText
from flexcache.sequences.chats.template import Template

THOUGHT = re.compile(r"<think>\s*(.*?)\s*(?:</think>\s*|\Z)", re.DOTALL)
UNOPENED = re.compile(r"((?:(?!<think>).)*?)\s*</think>\s*", re.DOTALL)
"""Reasoning in an assistant's content, with its tags; models whose prompt has the first tag write only the second."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Span:
    """Characters *start* to *stop*, excluded, of a rendered chat: a part of a message, by its number."""

    start: int
    stop: int
    message: int
    part: str


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Attributes
    ----------
    text : str
    roles : list of str
        The role of each message.
    spans : list of Span
        In the order of the text, without overlaps; what is between them is of the part ``template``, and so are tags
        around reasoning in a content, which have a span for their message.
    messages : list of dict
        The messages as they were rendered.
    left_out : tuple of str
        The part of each text of the messages that is not in the rendering.
    """

    text: str
    roles: list[str]
    spans: list[Span]
    messages: list[dict[str, Any]] = field(repr=False)
    left_out: tuple[str, ...] = ()


def check_template(tokenizer: Any, options: ChatOptions | None = None) -> None:
    """Raise ConfigError if a tokenizer cannot render chats, or does not know where in the text its tokens are."""
    template = (options and options.template) or getattr(tokenizer, "chat_template", None)
    if not template or not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the documents are chats, but the tokenizer cannot render them",
            expected="a fast tokenizer of transformers with a chat template",
            found=f"{type(tokenizer).__name__}, without a chat template"
            if not template
            else f"{type(tokenizer).__name__}, which is not fast",
            remedy="use the tokenizer of an instruction-tuned model, set tokenizer.chat_template, or give"
            " chat={'template': file}",
        )


def render_chat(
    tokenizer: Any,
    conversation: Conversation | Sequence[dict[str, Any]],
    name: str,
    options: ChatOptions | None = None,
) -> Chat:
    """Return a chat as text, with the place of each part of each message.

    The text is what ``apply_chat_template`` returns. If the template does not take the messages as they are, other
    forms of the same messages are tried: contents that are lists of parts as one text, or the other way round, an empty
    content in place of none, arguments of tool calls as dicts or as JSON.

    Raises
    ------
    DocumentsError
        The template raises an error, or a text of a message cannot be found in the rendering; it names the message.
    """
    if not isinstance(conversation, Conversation):
        conversation = Conversation(list(conversation))
    template = Template(tokenizer, conversation, options or ChatOptions())
    text, messages = template.render_first(name)
    texts, found, unplaced = find_texts(text, messages, template.render_or_none, template.literals)
    roles = [str(message["role"]) for message in messages]
    for number in unplaced:
        if texts[number].kind == "text":
            raise _unplaced(texts[number], text, name)
    there = {piece.text for piece in found}
    left_out = [t.part for n, t in enumerate(texts) if t.kind in ("text", "name") and t.text.strip() and n not in there]
    return Chat(text, roles, _spans(text, messages, texts, found), messages, tuple(left_out))


def render_text(tokenizer: Any, conversation: Conversation, name: str, options: ChatOptions) -> str:
    """Return a chat as text alone; see `render_chat`."""
    return Template(tokenizer, conversation, options).render_first(name)[0]


def find_tokens(chat: Chat, places: np.ndarray, generated: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the message of each token, and the number of its part in `PARTS`.

    A token belongs to a span that it shares a character with, to the last of several. Tokens of the template have
    message −1 and part 0.

    Parameters
    ----------
    places : ndarray of int, shape (tokens, 2)
        First character of each token and the one after its last.
    generated : ndarray of bool, shape (tokens,), or None
        Tokens inside ``{% generation %}``: those of the template among them belong to the assistant's message.

    Returns
    -------
    turn : ndarray of int64, shape (tokens,)
    part : ndarray of int8, shape (tokens,)
    """
    starts, stops, message = (
        np.array([getattr(span, name) for span in chat.spans], np.int64) for name in ("start", "stop", "message")
    )
    kinds = np.array([PARTS.index(span.part) for span in chat.spans], np.int8)
    at = np.searchsorted(starts, places[:, 1], side="left") - 1
    inside = at >= 0
    inside[inside] = stops[at[inside]] > places[inside, 0]
    turn, part = np.full(len(places), -1, np.int64), np.zeros(len(places), np.int8)
    turn[inside], part[inside] = message[at[inside]], kinds[at[inside]]
    return (turn if generated is None else _with_generated(chat, turn, generated)), part


def generated_tokens(
    tokenizer: Any, chat: Chat, conversation: Conversation, tokens: list[int], options: ChatOptions | None = None
) -> np.ndarray | None:
    """Return True for each token inside ``{% generation %}``; None if the template does not use that block."""
    template = Template(tokenizer, conversation, options or ChatOptions())
    if not GENERATION.search(template.source):
        return None
    found = template.apply(chat.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return np.array(found["assistant_masks"], bool) if list(found["input_ids"]) == list(tokens) else None


def _spans(text: str, messages: list[dict[str, Any]], texts: list[MessageText], found: list[Found]) -> list[Span]:
    """Return the spans of a rendering from the pieces of its texts."""
    result: list[Span] = []
    at = 0
    while at < len(found):
        piece, of = found[at], texts[found[at].text]
        at += 1
        if of.part == "tool_call" and of.kind == "name" and any(other.text == piece.text for other in found[: at - 1]):
            continue  # the name is repeated in front of the result
        if of.arguments is not None:  # what the template writes between two of the same dict belongs to it
            stop, last = piece.stop, piece.text
            while at < len(found) and texts[found[at].text].arguments == of.arguments and found[at].text > last:
                stop, last = found[at].stop, found[at].text
                at += 1
            spans = [Span(*_whole(text, piece.start, stop, messages, of), of.message, of.part)]
        elif of.part == "content" and messages[of.message]["role"] == "assistant":
            spans = [
                Span(piece.place(low, of.text), piece.place(high, of.text), of.message, part)
                for low, high, part in _thoughts(of.text, piece.low, piece.high)
            ]
        else:
            spans = [Span(piece.start, piece.stop, of.message, of.part)]
        for span in spans:
            start = max(span.start, result[-1].stop if result else 0)
            if start < span.stop:
                result.append(Span(start, span.stop, span.message, span.part))
    return result


def _thoughts(text: str, low: int, high: int) -> list[tuple[int, int, str]]:
    """Return characters *low* to *high* of an assistant's text in pieces of content, reasoning, and tags around it."""
    hits = list(THOUGHT.finditer(text))
    if "</think>" in text and (opening := UNOPENED.match(text)) is not None:
        hits = [opening, *(hit for hit in hits if hit.start() >= opening.end())]
    cuts = {low, high, *(cut for hit in hits for group in (0, 1) for cut in hit.span(group) if low < cut < high)}

    def part_at(place: int) -> str:
        hit = next((hit for hit in hits if hit.start() <= place < hit.end()), None)
        return "content" if hit is None else "reasoning" if hit.start(1) <= place < hit.end(1) else "template"

    return [(start, stop, part_at(start)) for start, stop in itertools.pairwise(sorted(cuts))]


def _whole(text: str, start: int, stop: int, messages: list[dict[str, Any]], of: MessageText) -> tuple[int, int]:
    """Return the characters of arguments with the JSON around their texts, if they are written as JSON."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert of.arguments is not None
    call = calls[of.arguments]
    arguments = (call.get("function") or call)["arguments"]
    written = [
        json.dumps(arguments, ensure_ascii=ascii, separators=marks, indent=indent, sort_keys=ordered)
        for ascii in (False, True)
        for marks in (None, (",", ":"))
        for indent in (None, 2, 4)
        for ordered in (False, True)
    ]
    for one in [*written, str(arguments)]:
        at = text.find(one, max(0, stop - len(one)), start + len(one))
        if at >= 0:
            return at, at + len(one)
    return start, stop


def _with_generated(chat: Chat, turn: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Return the messages of tokens with those of the template that are generated: that of the text next to them."""
    result = turn.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], generated, [False]]).astype(np.int8)))
    assistants = [number for number, role in enumerate(chat.roles) if role == "assistant"]
    for start, stop in edges.reshape(-1, 2).tolist():
        own = turn[start:stop]
        told = np.flatnonzero(own >= 0)
        if not len(told):  # an empty message: the next one of the assistant
            before = turn[:start].max(initial=-1)
            before = max(before, result[:start].max(initial=-1))
            following = next((number for number in assistants if number > before), -1)
            result[start:stop] = following
            continue
        nearest = told[np.maximum(np.searchsorted(told, np.arange(stop - start), side="right") - 1, 0)]
        result[start:stop] = own[nearest]
    return result


def _unplaced(text: MessageText, rendered: str, name: str) -> DocumentsError:
    before = text.text[: len(text.text) // 2].strip()
    near = rendered.lower().find(text.text.strip().lower())
    shown = rendered[near : near + len(text.text)] if near >= 0 and before else rendered
    return DocumentsError(
        f"the chat template changes the {'content' if text.part == 'tool_result' else text.part} of a message",
        where=f"document {name!r}, message {text.message}",
        expected=repr(text.text[:60]),
        found=repr(shown[:60]),
        remedy="render the chat yourself, and give the text with spans of characters",
    )
