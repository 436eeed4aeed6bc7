"""Conversations of seven shapes under the chat templates of many families.

The table in docs/conversations.md is the result of these tests: ``python -m tests.sequences.test_templates`` prints it.
"""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexcache import open_documents
from flexcache.errors import DocumentsError
from flexcache.options import SequenceOptions
from flexcache.sequences import encode_documents
from flexcache.sequences.chats import PARTS
from flexcache.sequences.encoded import Encoded
from tests.sequences.chat_shapes import IN_PARTS, SHAPES, THOUGHT_AND_CALL, TOOLS, WEATHER, families, fast_tokenizer

PAGE = Path(__file__).parents[2] / "docs/conversations.md"
BEGIN, END = "<!-- table of templates: begin -->", "<!-- table of templates: end -->"
Chat = list[dict[str, Any]]
Place = tuple[int, int, int, str]
"""First character, the one after the last, number of the message, and part."""


def forms(chat: Chat) -> list[Chat]:
    """The forms of the same messages that templates differ about."""
    found = []
    for arguments, empty, parts in itertools.product(
        (dict, str), (None, "", [{"type": "text", "text": ""}]), (False, True)
    ):
        form = copy.deepcopy(chat)
        for message in form:
            for call in message.get("tool_calls", ()):
                if arguments is str:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            if message["content"] is None:
                message["content"] = empty
            elif isinstance(message["content"], list):
                whole = "".join(part["text"] for part in message["content"])
                message["content"] = message["content"] if parts else whole
            elif parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
        found.append(form)
    return found


def renderings(tokenizer: Any, chat: Chat, tools: Any) -> list[str]:
    """The chat as the template writes each form that it takes, the given one first; empty if it takes none."""
    found = []
    for form in (chat, *forms(chat)):
        try:
            found.append(tokenizer.apply_chat_template(form, tools=tools, tokenize=False))
        except Exception:
            continue
    return [text for text in found if "{'type': 'text'" not in text]  # of a template that prints lists


def texts(chat: Chat) -> list[tuple[int, str, str]]:
    """Number of the message, part and text of all that the messages say."""
    found: list[tuple[int, str, str]] = []
    for number, message in enumerate(chat):
        content = message["content"] or ""
        for key in ("reasoning_content", "thinking"):
            found += [(number, "reasoning", message[key])] if key in message else []
        if message["role"] == "assistant" and "</think>" in content:
            thought, content = content.removeprefix("<think>").split("</think>")
            found.append((number, "reasoning", thought))
        said = [part["text"] for part in content] if isinstance(content, list) else [content]
        found += [(number, "tool_result" if message["role"] == "tool" else "content", text) for text in said]
        for call in message.get("tool_calls", ()):
            values = call["function"]["arguments"].values()
            found += [(number, "tool_call", value) for value in values if isinstance(value, str)]
    return [(number, part, text.strip()) for number, part, text in found if text.strip()]


def expected_places(chat: Chat, rendered: str) -> list[Place]:
    """The characters of each text; equal texts are in the order of their messages, and left-out ones are missing."""
    said, places = texts(chat), []
    for text in dict.fromkeys(text for _, _, text in said):
        owners = [(number, part) for number, part, other in said if other == text]
        written = {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]}
        found = {at: one for one in written for at in occurrences(rendered, one)}
        starts = sorted(found)[-len(owners) :]
        assert not starts or len(starts) == len(owners)
        places += [(at, at + len(found[at]), *owner) for at, owner in zip(starts, owners)]
    return places


def occurrences(text: str, part: str) -> list[int]:
    return [at for at in range(len(text)) if text.startswith(part, at)]


def overlap(places: list[tuple[int, int]], start: int, stop: int) -> Any:
    low, high = np.array(places).T
    return (low < stop) & (high > start)


def encode(tokenizer: Any, chat: Chat, tools: Any) -> Encoded:
    document = {"id": "a", "messages": chat} | ({"tools": tools} if tools else {})
    [batch] = open_documents([document]).batches()
    return encode_documents(batch, tokenizer, SequenceOptions())


def check(tokenizer: Any, chat: Chat, tools: Any) -> tuple[str, set[tuple[int, str]]]:
    """Compare the tokens of a chat and their messages with one rendering, and return what the rendering contains.

    The first value is empty, or says who refuses the chat.
    """
    written = renderings(tokenizer, chat, tools)
    if not written:
        with pytest.raises(DocumentsError, match="the chat template rejects a document") as caught:
            encode(tokenizer, chat, tools)
        assert "document 'a'" in str(caught.value)
        return "refused by the template", set()
    encoded = encode(tokenizer, chat, tools)
    assert encoded.chats is not None
    rendered = encoded.chats[0].text
    assert rendered in written
    amount = [len(expected_places(chat, text)) for text in written]
    assert (
        rendered in [text for text, number in zip(written, amount) if number == max(amount)] or rendered == written[0]
    )
    told = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.flat.tolist() == told["input_ids"]
    assert encoded.turn is not None
    assert encoded.part is not None
    turn, part = encoded.turn, [PARTS[number] for number in encoded.part.tolist()]
    owned = np.zeros(len(turn), bool)
    places = expected_places(chat, rendered)
    for start, stop, number, kind in places:
        around = rendered[:start].rstrip(), rendered[stop:].lstrip()
        owned |= overlap(told["offset_mapping"], len(around[0]), len(rendered) - len(around[1]))
        inside = np.flatnonzero(overlap(told["offset_mapping"], start, stop))
        assert {(int(turn[at]), part[at]) for at in inside} == {(number, kind)}, rendered[start:stop]
    for at in np.flatnonzero(~owned):
        low, high = told["offset_mapping"][at]
        others = ("template", "tool_call", "tool_result")  # names and ids of calls, and the JSON around arguments
        assert part[at] in others or not rendered[low:high].strip(), rendered[max(0, low - 20) : high + 20]
    return "", {(number, kind) for *_, number, kind in places}


def describe(shape: str, said: set[tuple[int, str]]) -> str:
    """The cell of the table for what a rendering contains."""
    if shape == "system":
        return "yes" if (0, "content") in said else "left out"
    if shape in TOOLS:
        there = [
            name
            for name, part in (("calls", "tool_call"), ("results", "tool_result"))
            if (1, part) in said or (2, part) in said
        ]
        return " and ".join(there) if len(there) == 2 else f"{there[0]} only" if there else "left out"
    if shape.startswith("reasoning"):
        turns = [number for number, part in sorted(said) if part == "reasoning"]
        return {(): "left out", (1, 3): "all turns", (3,): "last turn"}[tuple(turns)]
    return "yes"


@cache
def row(name: str) -> tuple[str, ...]:
    """The cells of a family, once all its conversations are as expected."""
    return cells(families()[name])


def cells(template: str) -> tuple[str, ...]:
    tokenizer = copy.copy(fast_tokenizer())
    tokenizer.chat_template = template
    found = []
    for shape, chats in SHAPES.items():
        results = [check(tokenizer, chat, [WEATHER] if shape in TOOLS else None) for chat in chats]
        refused = [reason for reason, _ in results if reason]
        said = max((said for _, said in results), key=lambda said: sum(part == "reasoning" for _, part in said))
        found.append(refused[0] if len(refused) == len(results) else describe(shape, said))
    return tuple(found)


def table() -> str:
    lines = [f"| family | {' | '.join(SHAPES)} |", "|---|" + "---|" * len(SHAPES)]
    lines += [f"| {name} | {' | '.join(row(name))} |" for name in sorted(families(), key=str.casefold)]
    return "\n".join(lines)


@pytest.mark.parametrize("name", families())
def test_every_token_belongs_to_the_message_and_part_whose_text_it_is(name: str) -> None:
    assert row(name)[0] == "yes"


@pytest.mark.parametrize("name", families())
def test_reasoning_before_calls_and_contents_in_parts(name: str) -> None:
    tokenizer = copy.copy(fast_tokenizer())
    tokenizer.chat_template = families()[name]
    check(tokenizer, THOUGHT_AND_CALL, [WEATHER])
    check(tokenizer, IN_PARTS, None)


def test_the_table_of_templates_is_what_the_tests_find() -> None:
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0].strip() == table(), "python -m tests.sequences.test_templates prints the new one"


@pytest.mark.parametrize("text", ["hello", "", "</think>", "{{ x }}", "<|im_end|>", "user", '"}, {"', "\n", "[INST]"])
@pytest.mark.parametrize("name", ["ChatML", "Qwen 3", "Llama 3.1", "Mistral v3", "gpt-oss", "DeepSeek R1", "GLM 4.5"])
def test_texts_that_look_like_the_template_stay_with_their_message(name: str, text: str) -> None:
    tokenizer = copy.copy(fast_tokenizer())
    tokenizer.chat_template = families()[name]
    chat = [{"role": "user", "content": f"a{text}b"}, {"role": "assistant", "content": f"{text} c"}]
    encoded = encode(tokenizer, chat, None)
    assert encoded.flat.tolist() == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert encoded.turn is not None
    assert encoded.characters is not None
    assert encoded.chats is not None
    for number in range(2):
        own = encoded.characters[encoded.turn == number]
        said = "".join(encoded.chats[0].text[low:high] for low, high in dict.fromkeys(map(tuple, own.tolist())))
        assert chat[number]["content"].split("</think>")[-1].strip() in said.strip()


@pytest.mark.skipif(util.find_spec("trl") is None, reason="trl, which ships the templates of many models, is missing")
def test_templates_that_trl_ships() -> None:
    found = util.find_spec("trl")
    assert found is not None
    paths = [path for folder in found.submodule_search_locations or () for path in Path(folder).rglob("*.jinja")]
    assert len(paths) > 5
    for path in sorted(paths):
        assert cells(path.read_text())[:2] == ("yes", "yes"), path.name


if __name__ == "__main__":
    print(table())
