"""Rendered chats: the message of each token, and rows chosen by roles and turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis.dataset import targets
from flexcache.errors import ConfigError, DocumentsError, MismatchError
from flexcache.sequences.chats import render_chat
from tests.corpora import build_store
from tests.models import tiny

PLAIN = "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
TAGGED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
CHATS: list[dict[str, Any]] = [
    {
        "id": "a",
        "kind": "long",
        "messages": [
            {"role": "system", "content": "the lazy dog"},
            {"role": "user", "content": "user"},  # as the template has it in front
            {"role": "assistant", "content": "quick brown fox"},
            {"role": "user", "content": "jumps"},
            {"role": "assistant", "content": "over the dog"},
        ],
    },
    {
        "id": "b",
        "kind": "short",
        "messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": " dog "}],
    },
]
ROLES = {
    "a": [
        *("", "", "system", "system", "system", "", "", "", "user", "", "", "", "assistant", "assistant", "assistant"),
        *("", "", "", "user", "", "", "", "assistant", "assistant", "assistant", ""),
    ],
    "b": ["", "", "user", "", "", "", "assistant", ""],
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    tokenizer.chat_template = PLAIN
    return tokenizer


def said(store: flexcache.Store, name: str, document: str) -> list[Any]:
    values = store.token_label(name).to_pylist()
    return [values[row] for row in store.rows(document=document)]


def positions(store: flexcache.Store, document: str) -> list[int]:
    return store.coordinates["position"].values[store.rows(document=document)].tolist()


@pytest.mark.parametrize("suffix", ["list", "jsonl", "parquet"])
def test_every_token_has_the_role_and_the_turn_of_its_message(suffix: str, chatty: Any, tmp_path: Path) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = CHATS
    if suffix == "jsonl":
        source = tmp_path / "chats.jsonl"
        source.write_text("\n".join(map(json.dumps, CHATS)))
    if suffix == "parquet":
        source = tmp_path / "chats.parquet"
        pq.write_table(pa.Table.from_pylist(CHATS), source)
    store = build_store(tmp_path / "run.zarr", source, tokenizer=chatty)
    for name, roles in ROLES.items():
        assert [role or "" for role in said(store, "role", name)] == roles
    assert [turn for turn in said(store, "turn", "a") if turn is not None] == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
    texts = dict(zip(store.documents["id"].to_pylist(), store.documents["text"].to_pylist()))
    assert texts["b"] == "<s>user fox</s><s>assistant  dog </s>"
    assert store.documents["kind"].to_pylist() == [{"a": "long", "b": "short"}[name] for name in texts]
    ids = store.coordinates["token_id"].values[store.rows(document="b")].tolist()
    assert ids == chatty(texts["b"], add_special_tokens=False)["input_ids"]
    assert store.replayable.reasons.keys() <= {"weights"}
    [target] = targets.read(store, "role")
    assert set(target.values(store).to_pylist()) == {"system", "user", "assistant", None}


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ({"roles": ["assistant"]}, {"a": [12, 13, 14, 22, 23, 24], "b": [6]}),
        ({"roles": ["user", "system"]}, {"a": [2, 3, 4, 8, 18], "b": [2]}),
        ({"turns": [-1]}, {"a": [22, 23, 24], "b": [6]}),
        ({"turns": [-1, 5]}, {"a": [22, 23, 24], "b": [6]}),  # neither chat has a turn 5
        ({"turns": [0, 3]}, {"a": [2, 3, 4, 18], "b": [2]}),
        ({"roles": ["assistant"], "turns": [-1], "take": "last"}, {"a": [24], "b": [6]}),
        ({"roles": ["system"]}, {"a": [2, 3, 4]}),
    ],
)
def test_rows_can_be_chosen_by_roles_and_turns(
    rows: Any, kept: dict[str, list[int]], chatty: Any, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "run.zarr", CHATS, tokenizer=chatty, rows=rows)
    assert {name: positions(store, name) for name in store.documents["id"].to_pylist()} == kept


def test_generation_tags_include_the_end_of_the_assistants_messages(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TAGGED
    store = build_store(tmp_path / "run.zarr", CHATS[:1], tokenizer=tokenizer, rows={"roles": ["assistant"]})
    assert positions(store, "a") == [12, 13, 14, 15, 22, 23, 24, 25]
    assert said(store, "turn", "a") == [2] * 4 + [4] * 4


def test_windows_and_truncation_keep_roles_with_their_tokens(chatty: Any, tmp_path: Path) -> None:
    windows = build_store(tmp_path / "w.zarr", CHATS, tokenizer=chatty, windows={"length": 6, "stride": 4})
    assert [role or "" for role in said(windows, "role", "a")] == ROLES["a"]
    short = build_store(tmp_path / "s.zarr", CHATS, tokenizer=chatty, max_length=5)
    assert [role or "" for role in said(short, "role", "a")] == ROLES["a"][:5]
    assert short.plan["truncated_documents"] == 2


def test_a_model_runs_the_rendered_chat_and_more_chats_are_added(chatty: Any, tmp_path: Path) -> None:
    model, path, quiet = tiny("llama"), tmp_path / "run.zarr", {"progress": False}
    options: dict[str, Any] = {"layers": [1], "rows": {"roles": ["assistant"]}, "keep_text": False, **quiet}
    store = flexcache.capture(model, chatty, CHATS, path, **options)
    text = render_chat(chatty, CHATS[0]["messages"], "a").text
    ids = torch.tensor([chatty(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[2][0].numpy()
    assert np.allclose(store.read("resid_post", 1, store.rows(document="a")), states[positions(store, "a")], atol=2e-5)
    assert "text" not in store.documents.column_names
    flexcache.capture(model, chatty, CHATS, path, **options)
    other = [{**CHATS[1], "messages": [*CHATS[1]["messages"], {"role": "user", "content": "fox"}]}]
    with pytest.raises(DocumentsError, match="other contents"):
        flexcache.extend(model, chatty, path, other, **quiet)
    new = [{**chat, "id": f"new-{chat['id']}"} for chat in CHATS]
    assert flexcache.extend(model, chatty, path, [*CHATS, *new], new_only=True, **quiet).documents.num_rows == 4
    chatty.chat_template = TAGGED
    with pytest.raises(MismatchError, match="chat_template"):
        flexcache.extend(model, chatty, path, [{**CHATS[0], "id": "c"}], **quiet)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN.replace("m['content']", "m['content'] | upper"), "changes the content of a message"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_templates_that_hide_the_message_of_a_token_are_refused(
    template: str, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DocumentsError, match=message):
        build_store(tmp_path / "run.zarr", CHATS, tokenizer=tokenizer)
    assert not (tmp_path / "run.zarr").exists()


def test_a_system_message_inside_the_next_message_has_its_own_role(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' and messages | length == 1 %}{{ raise_exception('no user') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<s>' + m['role'] + ' ' }}"
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
        "{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    store = build_store(tmp_path / "run.zarr", CHATS, tokenizer=tokenizer)
    assert [role or "" for role in said(store, "role", "a")][:6] == ["", "", "system", "system", "system", "user"]


def test_messages_that_a_template_leaves_out_have_no_tokens(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    store = build_store(tmp_path / "run.zarr", CHATS, tokenizer=tokenizer)
    assert said(store, "turn", "a") == [4, 4, 4]
    assert store.plan["left_out"] == {"content": 5}


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "no messages"),
        ("hello", "str"),
        ([{"role": "user"}], "content: None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content: "),
        ([{"role": "user", "content": "fox", "tool_calls": ["f"]}], "tool_calls: "),
        (["fox"], "message 0"),
    ],
)
def test_invalid_messages_are_refused(messages: Any, found: str, chatty: Any, tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match="messages that cannot be read") as caught:
        build_store(tmp_path / "run.zarr", [{"id": "a", "messages": messages}], tokenizer=chatty)
    assert found in str(caught.value)


def test_a_tokenizer_without_a_template_and_roles_without_chats_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a chat template"):
        build_store(tmp_path / "run.zarr", CHATS, tokenizer=tokenizer)
    with pytest.raises(DocumentsError, match="are not chats"):
        build_store(tmp_path / "run.zarr", rows={"roles": ["user"]})


def test_a_chat_is_completed_by_the_assistants_next_message(chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = PLAIN + "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
    options = flexcache.Generation(max_new_tokens=3)
    texts = [{"id": "t", "text": "the fox"}]
    chats = [{"id": "c", "messages": CHATS[1]["messages"][:1]}]
    made = {}
    for name, prompts in (("chat", chats), ("text", texts)):
        documents = flexcache.generate(tiny("llama"), chatty, prompts, tmp_path / name, options)
        [row] = [row for batch in documents.batches() for row in batch.to_pylist()]
        made[name] = row["tokens"][: row["prompt_tokens"]]
        assert row["completion"] == chatty.decode(row["tokens"][row["prompt_tokens"] :], skip_special_tokens=True)
    assert made["chat"] == chatty("<s>user fox</s><s>assistant", add_special_tokens=False)["input_ids"]
    assert made["text"] == [1, *chatty("the fox", add_special_tokens=False)["input_ids"]]  # open at its end
