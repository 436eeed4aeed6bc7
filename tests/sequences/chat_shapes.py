"""Chat templates of many families, and conversations of the shapes that templates differ about."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "templates"
CALL_ID, SECOND_ID = "aB3dE6gH9", "zY8xW7vU6"
WEATHER = {
    "type": "function",
    "function": {
        "name": "find_weather",
        "description": "Find the weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "name of the place"},
                "days": {"type": "integer", "description": "days ahead"},
            },
            "required": ["place"],
        },
    },
}


def _said(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def _call(number: str, **arguments: Any) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": "find_weather", "arguments": arguments}}


def _result(number: str, content: str) -> dict[str, Any]:
    return _said("tool", content, tool_call_id=number, name="find_weather")


def _thought(key: str) -> list[dict[str, Any]]:
    """A chat with reasoning in both answers, under a key of its messages or between tags in their contents."""
    thoughts = ("Springs feed it,\n\nso I think of the Black Forest.", "  Passau has three rivers; one is the Inn.  ")
    answers = ("It rises in Donaueschingen.", "The Inn joins it\n- in Passau.")
    if key == "tags":
        first, second = (_said("assistant", f"<think>\n{t}\n</think>\n\n{a}") for t, a in zip(thoughts, answers))
    else:
        first, second = (_said("assistant", a, **{key: t}) for t, a in zip(thoughts, answers))
    return [_said("user", "Where does the Danube rise?"), first, _said("user", "And what joins it?"), second]


TOOLS: dict[str, list[list[dict[str, Any]]]] = {
    "one call": [
        [
            _said("user", "Will it snow?"),
            _said("assistant", None, tool_calls=[_call(CALL_ID, place="Trondheim centre", days=3)]),
            _result(CALL_ID, '{"sky": "heavy snow", "degrees": -4}'),
            _said("assistant", "It will, with four degrees below zero."),
            _said("user", "Thank you."),
            _said("assistant", "With pleasure."),
        ]
    ],
    "two calls": [
        [
            _said("user", "Where is it warmer?"),
            _said(
                "assistant",
                "I look both up.",
                tool_calls=[_call(CALL_ID, place="Palma «old town»"), _call(SECOND_ID, days=1, place="Faro")],
            ),
            _result(CALL_ID, "21 degrees\nand clear"),
            _result(SECOND_ID, "19 degrees, windy"),
            _said("assistant", "In the first of them."),
        ]
    ],
}
SHAPES: dict[str, list[list[dict[str, Any]]]] = {
    "one turn": [
        [
            _said("user", "  Where does the Danube rise?\nName the town.\n"),
            _said("assistant", "In Donaueschingen, «where two brooks meet».  "),
        ]
    ],
    "many turns": [
        [
            _said("user", "user: what is 2 + 2?"),
            _said("assistant", "**Four**.\n\n```python\nprint(2 + 2)\n```"),
            _said("user", 'Ünïcödé 漢字 🙂 with <b>tags</b> & "quotes"'),
            _said("assistant", "Noted: \\n is no new line."),
            _said("user", "Good."),
            _said("assistant", "Anything else?"),
            _said("user", "Good."),
            _said("assistant", "Goodbye from the assistant"),
        ]
    ],
    "system": [
        [
            _said("system", "You answer in rhymes, and\nname «rivers»."),
            _said("user", "Which river is long?"),
            _said("assistant", "The Nile goes on and on, while the day is gone."),
            _said("user", "Which one is short?"),
            _said("assistant", "The Pader, of a kind, is short, you will find."),
        ]
    ],
    **TOOLS,
    "reasoning": [_thought(key) for key in ("reasoning_content", "thinking")],
    "reasoning in tags": [_thought("tags")],
}
THOUGHT_AND_CALL = [
    _said("user", "Is it dry in Bergen?"),
    _said(
        "assistant",
        "",
        reasoning_content="A call will tell me, so I make one.",
        tool_calls=[_call(CALL_ID, place="Bergen harbour")],
    ),
    _result(CALL_ID, "rain all day"),
    _said("assistant", "No, not at all.", reasoning_content="The result says the contrary."),
]
IN_PARTS = [
    _said("user", [{"type": "text", "text": "Here is a poem."}, {"type": "text", "text": "Who wrote it?"}]),
    _said("assistant", [{"type": "text", "text": "Somebody with a pen."}]),
]


@cache
def families() -> dict[str, str]:
    """The templates by family, from files in which each begins at a line with ``###``."""
    found = {}
    for path in sorted(FOLDER.glob("*.jinja")):
        for name, text in re.findall(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", path.read_text(), re.DOTALL | re.MULTILINE):
            assert name not in found
            found[name] = text.rstrip("\n")
    return found


@cache
def fast_tokenizer() -> Any:
    """A small byte-level BPE that adds a BOS, with one token for each tag that the templates write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    sources = list(families().values())
    tags = {
        tag for text in sources for tag in re.findall(r"<[|｜][^<>|｜'\"\s]+[|｜]>|\[/?[A-Z_]{4,}\]|<\w+_of_\w+>", text)
    }
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", "<pad>", *sorted(tags)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*sources, json.dumps(SHAPES, ensure_ascii=False)], trainer)
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
