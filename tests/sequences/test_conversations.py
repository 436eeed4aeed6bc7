"""Conversations with reasoning and tools, rendered once: the text, and the part of each token."""

from __future__ import annotations

import json
import random
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import flexcache
from analysis.dataset import targets
from analysis.dataset.probe_dataset import build_dataset
from flexcache.documents.messages import Conversation, read_messages, unpack_messages
from flexcache.errors import AnalysisError, ConfigError, DocumentsError, MismatchError
from flexcache.recording.planning import planning
from flexcache.sequences import messages_digests
from flexcache.sequences.chats import Chat, render_chat
from flexcache.sequences.chats.marks import _stripped
from pipelines import info
from pipelines.config import read_config
from tests.corpora import build_store
from tests.sequences.short_templates import CHATML, FAMILIES, THINKING, byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}]
ARGUMENTS = {"city": 'Paris "x"', "days": 3, "deep": {"a": [True, None, "q"]}}
WRITTEN = json.dumps(ARGUMENTS)
REASONING: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "\nWho?\n"},
    {"role": "assistant", "reasoning_content": "\nA name.\n", "content": "Ann."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": '<think>\nAgain.\n</think>\n\nBob "B"'},
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "How warm?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Call it.",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "1", "content": '{"t": 21}'},
    {"role": "assistant", "content": "21."},
]
SAID = [(0, "content", "Be kind."), (2, "content", "Ann."), (3, "content", "user")]
THOUGHT = [(4, "template", "<think>\n"), (4, "reasoning", "Again."), (4, "template", "\n</think>\n\n")]
CALLED = [(1, "tool_call", "weather"), (1, "tool_call", WRITTEN)]
PARTS: dict[str, tuple[list[tuple[int, str, str]], list[tuple[int, str, str]] | None]] = {
    "chatml": (
        [*SAID, (1, "content", "\nWho?\n"), *THOUGHT, (4, "content", 'Bob "B"')],
        [(2, "tool_result", '{"t": 21}')],
    ),
    "thinking": (
        [*SAID, (1, "content", "\nWho?\n"), *THOUGHT, (4, "content", 'Bob "B"')],
        [(1, "reasoning", "Call it."), *CALLED, (2, "tool_result", '{"t": 21}')],
    ),
    "headers": (
        [*SAID, (1, "content", "Who?"), *THOUGHT, (4, "content", 'Bob "B"')],
        [*CALLED, (2, "tool_result", '{\\"t\\": 21}')],
    ),
    "brackets": ([*SAID, (1, "content", "\nWho?\n"), *THOUGHT, (4, "content", 'Bob "B"')], None),
    "dropped": (
        [*SAID, (1, "content", "\nWho?\n"), (4, "template", "\n\n"), (4, "content", 'Bob "B"')],
        [*CALLED, (2, "tool_result", '{"t": 21}')],
    ),
}
PARTS["generation"] = PARTS["chatml"]
PLAIN = [{"id": "a", "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]}]


def pieces(chat: Chat) -> list[tuple[int, str, str]]:
    return [(span.message, span.part, chat.text[span.start : span.stop]) for span in chat.spans]


def labels(store: flexcache.Store, document: int = 0) -> list[tuple[Any, ...]]:
    rows = store.rows(document=document)
    columns = [store.token_label(name).to_pylist() for name in ("role", "turn", "part")]
    return [tuple(column[row] for column in columns) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", ["reasoning", "calls"])
def test_each_part_of_a_message_is_found_in_the_one_rendering(family: str, shape: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(FAMILIES[family])
    expected = PARTS[family][shape == "calls"]
    messages, tools = (REASONING, None) if shape == "reasoning" else (CALLS, TOOLS)
    if expected is None:
        with pytest.raises(DocumentsError, match="roles must alternate"):
            render_chat(tokenizer, messages, "a")
        return
    if shape == "calls":
        expected = [(0, "content", "How warm?"), *expected, (3, "content", "21.")]
    chat = render_chat(tokenizer, Conversation(messages, tools), "a")
    assert sorted(pieces(chat)) == sorted(expected)
    document = {"messages": messages, **({"tools": tools} if tools else {})}
    store = build_store(tmp_path / "run.zarr", [document], tokenizer=tokenizer)
    ids = store.coordinates["token_id"].values.tolist()
    assert ids == tokenizer(chat.text, add_special_tokens=False)["input_ids"]
    by_byte = [("template", None)] * len(chat.text.encode())
    for span in chat.spans:
        low, high = (len(chat.text[:at].encode()) for at in (span.start, span.stop))
        by_byte[low:high] = [(span.part, span.message)] * (high - low)
    at = 0
    for (role, turn, part), token in zip(labels(store), ids, strict=True):
        assert part == by_byte[at][0]
        assert turn == by_byte[at][1] or (family == "generation" and by_byte[at][1] is None)
        assert role == (None if turn is None else messages[turn]["role"])
        at += len(tokenizer.decode([token]).encode()) if token >= 256 else 1
    assert at == len(by_byte)


def test_keys_that_a_template_sorts_and_values_apart_are_found() -> None:
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ '<' + call.function.name + '>' }}"
        "{% for name, value in call.function.arguments | dictsort %}{{ name + '=' + value | string + ';' }}{% endfor %}"
        "{% endfor %}{% if m.role == 'tool' %}{{ '[' + messages[0].tool_calls[0].function.name + ']' }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    call = {"function": {"name": "weather", "arguments": {"town": "Paris", "day": 3, "at": "noon"}}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "21"}]
    chat = render_chat(byte_tokenizer(template), messages, "a")
    assert chat.text == "<weather>at=noon;day=3;town=Paris;[weather]21"
    found = pieces(chat)
    assert found[0] == (0, "tool_call", "weather")
    assert found[-1] == (1, "tool_result", "21")
    assert [text for _, part, text in found[1:-1] if part == "tool_call"] == ["noon", "Paris"]
    in_order = template.replace(" | dictsort", ".items()")
    found = pieces(render_chat(byte_tokenizer(in_order), messages, "a"))
    assert found[1:-1] == [(0, "tool_call", "town=Paris;day=3;at=noon")]


def test_as_given_is_what_the_template_gets() -> None:
    for family, template in FAMILIES.items():
        tokenizer = byte_tokenizer(template)
        for messages, tools in ((REASONING, None), *(() if family in ("brackets", "dropped") else ((CALLS, TOOLS),))):
            try:
                expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            except Exception:  # templates that need a content, or arguments as text
                continue
            assert render_chat(tokenizer, Conversation(messages, tools), "a").text == expected


TRICKY = [
    "</think>",
    "<think>",
    "\n",
    " ",
    "user",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    '"',
    "\\",
    "é",
    "👍",
    "{{ x }}",
]
TRICKY += ["<reply>", "</reply>", "\t", "  \n\n", "role", "x", "\U00040001", "\\n", "a b", "."]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choices(TRICKY, k=draw.randint(1, 6)))


def test_texts_that_look_like_the_template_are_found_where_they_are() -> None:
    draw, tokenizer = random.Random(5), byte_tokenizer(CHATML)
    for _ in range(300):
        messages = [{"role": draw.choice(["user", "system"]), "content": random_text(draw)} for _ in range(4)]
        chat = render_chat(tokenizer, messages, "a")
        at, expected = 0, []
        for number, message in enumerate(messages):
            at += len(f"<|im_start|>{message['role']}\n")
            expected.append((number, at, at + len(message["content"])))
            at += len(f"{message['content']}<|im_end|>\n")
        assert [(span.message, span.start, span.stop) for span in chat.spans] == expected


@pytest.mark.parametrize("family", ["thinking", "headers", "dropped"])
def test_texts_that_a_template_reads_belong_to_their_message(family: str) -> None:
    draw, tokenizer = random.Random(6), byte_tokenizer(FAMILIES[family])
    for _ in range(150):
        said = [f"A{random_text(draw)}Z" for _ in range(4)]
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said)]
        chat = render_chat(tokenizer, messages, "a")
        assert chat.text == tokenizer.apply_chat_template(messages, tokenize=False)
        for number, text in enumerate(said):
            found = "".join(chat.text[span.start : span.stop] for span in chat.spans if span.message == number)
            shown = text if number % 2 == 0 or "</think>" not in text else text.split("</think>")[-1].lstrip("\n")
            assert shown.strip() in found


def test_a_text_of_more_characters_than_there_are_marks_is_found() -> None:
    from flexcache.sequences.chats import marks

    tokenizer, content = byte_tokenizer(THINKING), "word </think> " * 20
    few = range(0x40000, 0x40010)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "PLANES", (few,))
        chat = render_chat(tokenizer, [{"role": "user", "content": content}], "a")
    assert pieces(chat) == [(0, "content", content)]


def test_white_space_at_both_ends_is_stripped_without_trying_all_pairs_of_ends() -> None:
    trimming = CHATML.replace("m.content", "m.content | trim")
    assert trimming != CHATML
    source = "\n" * 20_000 + "x" + "\n" * 20_000
    chat = render_chat(byte_tokenizer(trimming), [{"role": "user", "content": source}], "a")
    assert pieces(chat) == [(0, "content", "x")]
    assert len(list(_stripped(" " * 50 + "x" + " " * 50, 0, 101, lambda head: not head))) == 51


def written(kind: str, documents: list[dict[str, Any]], folder: Path) -> Any:
    if kind == "jsonl":
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, documents)))
        return folder / "chats.jsonl"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(documents), folder / "chats.parquet")
        return folder / "chats.parquet"
    if kind == "text":
        as_json = [{name: json.dumps(value) for name, value in document.items()} for document in documents]
        return pa.Table.from_pylist(as_json)
    if kind == "dataset":
        return pytest.importorskip("datasets").Dataset.from_list(documents)
    return documents


@pytest.mark.parametrize("kind", ["list", "jsonl", "parquet", "dataset", "text"])
def test_conversations_are_read_from_every_source(kind: str, tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "now", "parameters": {"zone": {"type": "string"}}}}
    documents: list[dict[str, Any]] = [
        {"messages": CALLS, "tools": TOOLS, "kind": "calls"},
        {"messages": REASONING, "tools": [other], "kind": "thoughts"},
    ]
    sparse = kind in ("parquet", "dataset")  # there null stands for what is not there, and a list has one type
    if sparse:
        call = {"function": {"name": "weather", "arguments": {"city": "Paris", "deep": {"a": ["q"]}}}}
        documents[0] = {
            **documents[0],
            "tools": [{"name": "weather"}],
            "messages": [CALLS[0], {"role": "assistant", "tool_calls": [call]}],
        }
    source = written(kind, documents, tmp_path)
    corpus = flexcache.open_documents(source)
    assert (corpus.content, corpus.labels) == ("messages", ("kind",))
    chats = [unpack_messages(chat) for batch in corpus.batches() for chat in batch.column(1).to_pylist()]
    for chat, document in zip(chats, documents, strict=True):
        assert chat.tools == document["tools"]
        assert [m["role"] for m in chat.messages] == [m["role"] for m in document["messages"]]
    tokenizer = byte_tokenizer(THINKING)
    store = build_store(tmp_path / "run.zarr", source, tokenizer=tokenizer)
    texts = dict(zip(store.documents["kind"].to_pylist(), store.documents["text"].to_pylist()))
    for chat, document in zip(chats, documents, strict=True):
        messages = [{k: v for k, v in m.items() if v is not None} for m in document["messages"]]
        assert chat.messages == messages
        said = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
        assert texts[json.dumps(document["kind"]) if kind == "text" else document["kind"]] == said
    assert store.documents.column_names[2:5] == ["n_tokens", "text", "messages_xxh3_128"]


def test_plain_chats_keep_the_digests_of_earlier_versions() -> None:
    corpus = flexcache.open_documents(PLAIN)
    [batch] = corpus.batches()
    assert corpus.digest() == "97fbaf8f3dbef08410762bb922db5172"
    assert messages_digests(batch.column(1).to_pylist()) == ["39c6e30f0582f38170831b4faf360093"]
    assert batch.column(1).to_pylist() == [PLAIN[0]["messages"]]


def test_messages_survive_a_round_trip_through_their_column() -> None:
    for messages in (REASONING, CALLS, [{"role": "user", "content": "\0{}"}], [{"role": "user", "content": "\0(1"}]):
        packed = read_messages(messages, "a", tools=TOOLS)
        again = read_messages(packed, "a", sparse=True)
        assert again == packed
        given = [{name: value for name, value in message.items() if value is not None} for message in messages]
        assert unpack_messages(again) == Conversation(given, TOOLS)


@pytest.mark.parametrize(
    "text",
    [
        "\0[a",
        "\0[1]",
        '\0{"role": "system", "content": "Obey."}',
        '\0{"role": "user", "content": "Obey."}',
        "\0" + "[" * 9999,
    ],
)
def test_a_text_that_looks_like_a_packed_message_stays_a_text_of_its_message(text: str) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "No."}]
    packed = read_messages(messages, "a")
    assert unpack_messages(packed) == Conversation(messages)
    assert read_messages(packed, "a") == packed


def test_parts_are_rows_groups_and_targets(tmp_path: Path) -> None:
    tokenizer, documents = byte_tokenizer(THINKING), [{"messages": CALLS, "tools": TOOLS}] * 4
    store = build_store(tmp_path / "all.zarr", documents, tokenizer=tokenizer)
    printed = StringIO()
    info.run(store.path, Console(file=printed, width=120))
    assert "labels of tokens: role, turn, part\n" in printed.getvalue()
    [part] = targets.read(store, "part")
    with pytest.raises(AnalysisError, match=r"label of tokens[\s\S]*targets.read"):
        build_dataset(store, "resid_post", "part", layers=[0])
    dataset = build_dataset(store, "resid_post", part, layers=[0], groups="turn")
    assert dataset.classes == ("content", "reasoning", "tool_call", "tool_result")  # the template has no turn
    assert dataset.n_groups == 4
    assert dataset.dropped["tokens without a group"] == sum(
        turn is None for turn in store.token_label("turn").to_pylist()
    )
    by_role = build_dataset(store, "resid_post", part, layers=[0], groups="role")
    roles = np.array(store.token_label("role").to_pylist(), object)[by_role.row]
    assert len({(role, group) for role, group in zip(roles, by_role.group.tolist())}) == by_role.n_groups == 3
    assert "template" in build_dataset(store, "resid_post", part, layers=[0]).classes
    with pytest.raises(AnalysisError, match="groups by tokens"):
        build_dataset(store, "resid_post", "n_tokens", rows="mean", groups="part")
    rules = {"parts": ["reasoning"], "roles": ["assistant"], "turns": [1]}
    some = build_store(tmp_path / "some.zarr", documents, tokenizer=tokenizer, rows=rules)
    ids = some.coordinates["token_id"].values[some.rows(document=0)]
    assert tokenizer.decode(ids) == "Call it."
    outside = build_store(tmp_path / "none.zarr", documents, tokenizer=tokenizer, rows={"parts": ["template"]})
    assert set(outside.token_label("part").to_pylist()) == {"template"}
    with pytest.raises(ConfigError, match="parts"):
        build_store(tmp_path / "no.zarr", documents, tokenizer=tokenizer, rows={"parts": ["thought"]})
    with pytest.raises(DocumentsError, match="are not chats"):
        build_store(tmp_path / "no.zarr", rows={"parts": ["content"]})


def test_rows_of_a_role_that_no_message_has_are_refused_with_the_roles(tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match="there are no documents with rows") as caught:
        build_store(tmp_path / "a", PLAIN, tokenizer=byte_tokenizer(CHATML), rows={"roles": ["asistant"]})
    assert ", 1 without rows" in str(caught.value)
    assert "the messages have the roles assistant, user" in str(caught.value)


def test_options_of_the_template_are_part_of_the_identity_of_a_store(tmp_path: Path) -> None:
    tokenizer, path = byte_tokenizer(THINKING), tmp_path / "run.zarr"
    ask = [{"messages": [{"role": "user", "content": "Who?"}]}]
    chat = {"template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True}
    store = build_store(path, ask, tokenizer=tokenizer, chat=chat)
    expected = tokenizer.apply_chat_template(
        ask[0]["messages"], add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert store.documents["text"].to_pylist() == [expected]
    assert flexcache.open(path).spec.chat == flexcache.ChatOptions(**chat)
    asked = {"add_generation_prompt": True}
    assert build_store(tmp_path / "asked.zarr", ask, tokenizer=tokenizer, chat=asked).spec.chat is not None
    for other in (None, asked):
        with pytest.raises(MismatchError, match="spec.chat"):
            build_store(path, ask, tokenizer=tokenizer, chat=other)
    plain = build_store(tmp_path / "plain.zarr", ask, tokenizer=tokenizer)
    assert (
        "chat" not in json.loads((tmp_path / "plain.zarr" / "zarr.json").read_text())["attributes"]["flexcache"]["spec"]
    )
    assert plain.documents["text"].to_pylist()[0] == "<|im_start|>user\nWho?<|im_end|>\n"
    with pytest.raises(ConfigError, match="not chats"):
        build_store(tmp_path / "no.zarr", [{"text": "Who?"}], tokenizer=tokenizer, chat=chat)


def test_the_content_of_a_template_file_counts_and_not_its_name(tmp_path: Path) -> None:
    tokenizer, path = byte_tokenizer(THINKING), tmp_path / "run.zarr"
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text(CHATML)
    store = build_store(path, PLAIN, tokenizer=tokenizer, chat={"template": str(tmp_path / "a.jinja")})
    assert (
        store.documents["text"][0].as_py().startswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAnn.")
    )
    build_store(path, PLAIN, tokenizer=tokenizer, chat={"template": tmp_path / "b.jinja"})
    tokenizer.chat_template = None
    build_store(path, PLAIN, tokenizer=tokenizer, chat={"template": CHATML})
    (tmp_path / "b.jinja").write_text(f"{CHATML} ")
    with pytest.raises(MismatchError, match="chat_template_xxh3_128"):
        build_store(path, PLAIN, tokenizer=tokenizer, chat={"template": tmp_path / "b.jinja"})
    for wrong in ("none.jinja", "words.txt"):
        (tmp_path / "words.txt").write_text("no template")
        with pytest.raises(ConfigError, match="cannot be used"):
            flexcache.ChatOptions(template=str(tmp_path / wrong))


def test_a_configuration_file_has_the_options_of_the_template(tmp_path: Path) -> None:
    template, path = tmp_path / "short.jinja", tmp_path / "config.yaml"
    template.write_text(CHATML)
    chat = f"{{template: {template}, add_generation_prompt: true, template_kwargs: {{date_string: 2026-01-31}}}}"
    path.write_text(f"model: a\ndocuments: b.jsonl\nstore: run.zarr\nrows: {{parts: [reasoning]}}\nchat: {chat}\n")
    spec = read_config(path).spec()
    expected = {"template": CHATML, "add_generation_prompt": True, "template_kwargs": {"date_string": "2026-01-31"}}
    assert spec.model_dump(mode="json")["chat"] == expected
    assert spec.choice is not None
    assert spec.choice.parts == ("reasoning",)
    changed = read_config(path, ["chat={template_kwargs: {thinking: false}}"]).spec()
    assert changed.chat == flexcache.ChatOptions(template_kwargs={"thinking": False})
    generated = read_config(path, ["generate={max_new_tokens: 2}"])
    assert generated.spec().chat is None, "completions are tokens"
    assert generated.chat is not None
    with pytest.raises(ConfigError, match="cannot hold"):
        flexcache.ChatOptions(template_kwargs={"now": object()})
    for wrong, word in (("{templat: a}", "templat"), ("{template_kwargs: {tools: 1}}", "tools")):
        with pytest.raises(ConfigError, match=word):
            read_config(path, [f"chat={wrong}"])


def test_tools_of_the_options_are_for_documents_without_tools(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    chat = flexcache.ChatOptions(tools=str(tmp_path / "tools.json"))
    tokenizer = byte_tokenizer(THINKING)
    assert chat.tools == TOOLS
    assert '"weather"' in render_chat(tokenizer, PLAIN[0]["messages"], "a", chat).text
    own = Conversation(PLAIN[0]["messages"], [{"name": "now"}])
    assert '"weather"' not in render_chat(tokenizer, own, "a", chat).text


def test_an_older_store_of_chats_is_extended_without_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, path = byte_tokenizer(CHATML), tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(planning, "tokenize_corpus", partial(planning.tokenize_corpus, chat_labels=("role", "turn")))
        assert build_store(path, PLAIN, tokenizer=tokenizer).token_labels == ("role", "turn")
    store = build_store(path, [{**PLAIN[0], "id": "b"}], tokenizer=tokenizer, extend=True)
    assert store.token_labels == ("role", "turn")
    assert store.documents["id"].to_pylist() == ["a", "b"]


def test_a_label_of_the_documents_takes_the_place_of_the_part(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", [{**PLAIN[0], "part": "first"}], tokenizer=byte_tokenizer(CHATML))
    assert store.token_labels == ("role", "turn")
    assert store.documents["part"].to_pylist() == ["first"]


def test_a_template_that_leaves_texts_out_is_said_in_the_plan(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", [{"messages": CALLS}], tokenizer=byte_tokenizer(CHATML))
    assert store.plan["left_out"] == {"reasoning": 1, "tool_call": 1, "tool_result": 1}
    assert "1 of tool_call" in (tmp_path / "run.zarr" / "README.md").read_text()
    plain = build_store(tmp_path / "plain.zarr", PLAIN, tokenizer=byte_tokenizer(CHATML))
    assert "left_out" not in plain.plan


def test_contents_in_parts_and_arguments_as_json_are_rendered_in_the_form_that_a_template_takes() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    listed = "{% for m in messages %}{% for p in m.content %}{{ '[' + p.text + ']' }}{% endfor %}{% endfor %}"
    asked = [{"role": "user", "content": parts}]
    assert pieces(render_chat(byte_tokenizer(CHATML), asked, "a")) == [(0, "content", "Who is it?")]
    assert pieces(
        render_chat(
            byte_tokenizer(
                THINKING.replace("m.content.startswith", "(m.content|string).startswith").replace(
                    "m.content.endswith", "(m.content|string).endswith"
                )
            ),
            asked,
            "a",
        )
    ) == [(0, "content", "Who is it?")]
    one = [{"role": "user", "content": parts[:1]}]
    assert render_chat(byte_tokenizer(CHATML), one, "a").text == "<|im_start|>user\nWho <|im_end|>\n"
    split = render_chat(byte_tokenizer(listed), asked, "a")
    assert split.text == "[Who ][is it?]"
    assert pieces(split) == [(0, "content", "Who "), (0, "content", "is it?")]
    assert render_chat(byte_tokenizer(listed), [{"role": "user", "content": "Hi"}], "a").text == "[Hi]"
    call = {"name": "weather", "arguments": WRITTEN}
    as_json = [{"role": "assistant", "tool_calls": [{"function": call}]}]
    as_dict = [{"role": "assistant", "tool_calls": [{"function": {**call, "arguments": ARGUMENTS}}]}]
    for family in ("thinking", "dropped"):
        texts = {render_chat(byte_tokenizer(FAMILIES[family]), chat, "a").text for chat in (as_json, as_dict)}
        assert len(texts) == 1
        assert WRITTEN in texts.pop()


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "a part of type 'image'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": "Who?", "images": ["a.png"]}, "images as well"),
        ({"from": "human", "value": "Who?"}, "from and value"),
        ({"role": "assistant", "content": None}, "content: None"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "content: None, and a refusal"),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            "entry of tool_calls",
        ),
        ({"role": "assistant", "content": None, "tool_calls": ["f"]}, "tool_calls: "),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "arguments: 3"),
        ({"content": "Who?"}, "role: None"),
    ],
)
def test_messages_that_are_not_text_are_refused(message: dict[str, Any], found: str) -> None:
    with pytest.raises(DocumentsError, match="messages that cannot be read") as caught:
        list(flexcache.open_documents([{"messages": [message]}]).batches())
    assert found in str(caught.value)
    with pytest.raises(DocumentsError, match="tools that cannot be read"):
        list(flexcache.open_documents([{**PLAIN[0], "tools": "[1]"}]).batches())


def test_a_completion_is_prompted_with_the_options_of_the_template(tmp_path: Path) -> None:
    from tests.models import tiny

    tokenizer = byte_tokenizer(THINKING)
    ask, chat = [{"messages": [{"role": "user", "content": "Who?"}]}], {"template_kwargs": {"enable_thinking": False}}
    folder, quiet = tmp_path / "made", {"max_new_tokens": 2}
    model = tiny("llama", vocab_size=320)
    documents = flexcache.generate(model, tokenizer, ask, folder, chat=chat, **quiet)
    [row] = [row for batch in documents.batches() for row in batch.to_pylist()]
    expected = tokenizer.apply_chat_template(
        ask[0]["messages"], add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert row["tokens"][: row["prompt_tokens"]] == tokenizer(expected, add_special_tokens=False)["input_ids"]
    with pytest.raises(MismatchError, match="chat"):
        flexcache.generate(model, tokenizer, ask, folder, **quiet)
