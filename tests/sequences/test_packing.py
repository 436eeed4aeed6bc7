"""Documents one after the other in sequences of one length."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexcache
from flexcache.errors import ConfigError, DocumentsError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.recording.checks.attention_isolation import check_isolation
from flexcache.recording.forward.batch import split, unplanned_batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.capture_targets import find_targets
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.sequences.packing import ContinuousPacking, IsolatedPacking, PackingTokens
from flexcache.spec import CaptureSpec
from tests.corpora import build_store, lengths, token_documents
from tests.models import FAMILIES, VOCABULARY, tiny

DOCUMENTS = token_documents([37, 1, 8, 16, *lengths(40, longest=30)], vocabulary=VOCABULARY)
PACKING = {"length": 16, "separator": 2, "bos": 1}
QUIET = {"progress": False, "batch_tokens": 64}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def contexts(documents: list[list[Any]], length: int, separator: Any, bos: Any) -> list[list[Any]]:
    """Sequences by plain concatenation."""
    run: list[Any] = []
    for number, tokens in enumerate(documents):
        run += ([separator] if number and separator is not None else []) + tokens
    front = [] if bos is None else [bos]
    room = length - len(front)
    return [front + run[at : at + room] for at in range(0, len(run), room)]


@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=12),
    st.integers(4, 12),
    st.sampled_from([None, "sep"]),
    st.sampled_from([None, "bos"]),
)
def test_packed_sequences_equal_plain_concatenation(sizes: list[int], length: int, separator: Any, bos: Any) -> None:
    sequences = ContinuousPacking(np.array(sizes), length, PackingTokens(1 if separator else None, 1 if bos else None))
    expected = contexts([[(d, t) for t in range(n)] for d, n in enumerate(sizes)], length, separator, bos)
    segments = sequences.segments(np.arange(len(sequences.lengths)))
    assert sequences.lengths.tolist() == [len(sequence) for sequence in expected]
    found: list[list[Any]] = [[separator] * len(sequence) for sequence in expected]
    for line, document, start, count, place in zip(
        *(getattr(segments, n).tolist() for n in ("sequence", "document", "start", "length", "offset"))
    ):
        found[line][place : place + count] = [(document, start + i) for i in range(count)]
    for sequence in found:
        sequence[0] = bos or sequence[0]
    assert found == expected
    assert sequences.kept.tolist() == [sum(isinstance(t, tuple) for t in sequence) for sequence in expected]
    owners = [[t[0] for t in sequence if isinstance(t, tuple)] for sequence in expected]
    assert sequences.linked.tolist() == [i > 0 and owners[i][0] == owners[i - 1][-1] for i in range(len(owners))]


def test_rows_equal_the_models_output_on_each_sequence(tmp_path: Path) -> None:
    model = tiny("llama")
    documents = [{**item, "at": list(range(len(item["tokens"])))} for item in DOCUMENTS]
    store = flexcache.capture(
        model, None, documents, tmp_path / "run.zarr", layers=[1], packing=PACKING, token_labels=["at"], **QUIET
    )
    expected = contexts([item["tokens"] for item in DOCUMENTS], 16, 2, 1)
    assert store.n_units > 1
    batches = [batch for unit in range(store.n_units) for batch in BatchReader(store.path).read_unit(unit)]
    found = [tokens.tolist() for batch in batches for tokens in batch.tokens]
    once = [tokens for i, tokens in enumerate(found) if not i or tokens != found[i - 1]]  # of those that two units run
    assert once == expected
    assert store.documents["id"].to_pylist() == [item["id"] for item in DOCUMENTS]
    assert store.documents["n_rows"].to_pylist() == [len(item["tokens"]) for item in DOCUMENTS]
    with torch.no_grad():
        states = [model(torch.tensor([s]), output_hidden_states=True).hidden_states[2][0] for s in expected]
    ids = contexts([[(d["id"], i) for i in range(len(d["tokens"]))] for d in DOCUMENTS], 16, None, None)
    owners = contexts([[(d["id"], i) for i in range(len(d["tokens"]))] for d in DOCUMENTS], 16, "sep", "bos")
    assert sum(map(len, ids)) == store.n_rows
    rows = [state for line, owner in zip(states, owners) for state, who in zip(line, owner) if isinstance(who, tuple)]
    assert np.allclose(store.read("resid_post", 1), torch.stack(rows).numpy(), atol=2e-5)
    for item in DOCUMENTS:
        held = store.rows(document=item["id"])
        assert store.coordinates["token_id"].values[held].tolist() == item["tokens"]
        assert store.coordinates["position"].values[held].tolist() == list(range(len(item["tokens"])))
    assert store.token_label("at").to_pylist() == store.coordinates["position"].values.tolist()
    assert store.token_labels == ("at",)
    assert "packed" in str(store.replayable)
    assert all(item.equal for item in flexcache.recompute(model, store.path, units=100))
    lines = store.tokens.select(["documents", "starts", "places", "tokens"]).to_pylist()
    names = store.documents["id"].to_pylist()
    tokens = {item["id"]: item["tokens"] for item in DOCUMENTS}
    for line in lines:
        for document, start, place in zip(line["documents"], line["starts"], line["places"]):
            assert line["tokens"][place] == tokens[names[document]][start]


def test_documents_added_to_a_store_begin_a_new_sequence(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "run.zarr"
    flexcache.capture(model, None, DOCUMENTS, path, layers=[1], packing=PACKING, **QUIET)
    with pytest.raises(DocumentsError, match="other contents"):
        flexcache.extend(model, None, path, [{**DOCUMENTS[0], "tokens": [5] * 37}], progress=False)
    new = [{**item, "id": f"new-{item['id']}"} for item in DOCUMENTS]
    store = flexcache.extend(model, None, path, [*DOCUMENTS, *new], new_only=True, progress=False)
    assert store.documents["id"].to_pylist() == [item["id"] for item in [*DOCUMENTS, *new]]
    with torch.no_grad():
        first = model(torch.tensor([[1, *new[0]["tokens"][:15]]]), output_hidden_states=True).hidden_states[2][0, 1:]
    assert np.allclose(store.read("resid_post", 1, store.rows(document="new-doc-0")[:15]), first.numpy(), atol=2e-5)
    assert flexcache.verify(path).sound


def test_the_tokenizer_defines_the_tokens_between_documents(tokenizer: Any, tmp_path: Path) -> None:
    texts = [{"id": "a", "text": "the quick brown fox jumps"}, {"id": "b", "text": "over the lazy dog"}]
    store = build_store(tmp_path / "run.zarr", texts, tokenizer=tokenizer, packing={"length": 8})
    assert store.tokens["tokens"].to_pylist() == [[1, 4, 5, 6, 7, 8, 2, 9], [1, 4, 10, 11]]
    assert store.tokens["keep"].to_pylist() == [[1, 2, 3, 4, 5, 7], [1, 2, 3]]
    none = build_store(
        tmp_path / "none.zarr", texts, tokenizer=tokenizer, packing={"length": 8, "separator": None, "bos": None}
    )
    assert none.tokens["tokens"].to_pylist() == [[4, 5, 6, 7, 8, 9, 4, 10], [11]]


def isolated(sizes: list[int], length: int, opening: int) -> list[list[tuple[int, int, int]]]:
    """Pieces (document, start, tokens) of each sequence: whole documents as long as they fit, one by one."""
    room, found, used = length - opening, [], length
    for document, size in enumerate(sizes):
        for start in range(0, size, room):
            count = min(room, size - start)
            if used + count + opening > length:
                found.append([])
                used = 0
            found[-1].append((document, start, count))
            used += count + opening
    return found


@given(st.lists(st.integers(1, 25), min_size=1, max_size=12), st.integers(4, 12), st.sampled_from([None, 1]))
def test_isolated_documents_are_not_split_if_they_fit(sizes: list[int], length: int, bos: Any) -> None:
    sequences, opening = IsolatedPacking(np.array(sizes), length, PackingTokens(None, bos)), int(bos is not None)
    segments = sequences.segments(np.arange(len(sequences.lengths)))
    found: list[list[tuple[int, int, int]]] = [[] for _ in sequences.lengths]
    used = [0] * len(sequences.lengths)
    for line, document, start, count, place in zip(
        *(getattr(segments, n).tolist() for n in ("sequence", "document", "start", "length", "offset"))
    ):
        assert place == used[line] + opening
        found[line].append((document, start, count))
        used[line] = place + count
    assert found == isolated(sizes, length, opening)
    assert sequences.lengths.tolist() == used
    assert sequences.kept.tolist() == [sum(piece[2] for piece in line) for line in found]
    assert sequences.linked.tolist() == [line[0][1] > 0 for line in found]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_rows_of_isolated_documents_equal_those_of_documents_alone(family: str, tmp_path: Path) -> None:
    model, path = tiny(family), tmp_path / "run.zarr"
    packing = {"length": 24, "bos": 1, "isolate": True}
    sites = ["resid_post", "resid_post.grad"]
    store = flexcache.capture(model, None, DOCUMENTS, path, sites=sites, layers=[0, 3], packing=packing, **QUIET)
    assert store.n_units > 1
    assert max(len(line) for line in store.tokens["documents"].to_pylist()) > 2, "documents share sequences"
    alone = [
        {"id": f"{item['id']}+{start}", "tokens": [1, *item["tokens"][start : start + 23]]}
        for item in DOCUMENTS
        for start in range(0, len(item["tokens"]), 23)
    ]
    single = flexcache.capture(model, None, alone, tmp_path / "alone.zarr", sites=sites, layers=[0, 3], **QUIET)
    for item in DOCUMENTS:
        mine, tokens = store.rows(document=item["id"]), item["tokens"]
        pieces = [single.rows(document=f"{item['id']}+{start}")[1:] for start in range(0, len(tokens), 23)]
        for site in sites:
            for layer in (0, 3):
                expected = single.read(site, layer, np.concatenate(pieces))
                assert np.allclose(store.read(site, layer, mine), expected, atol=2e-5, rtol=1e-4), (site, layer)
        assert store.coordinates["token_id"].values[mine].tolist() == tokens
        assert store.coordinates["position"].values[mine].tolist() == list(range(len(tokens)))
    assert all(item.equal for item in flexcache.recompute(model, path, units=100))
    assert "packed" in str(store.replayable)
    assert store.token_labels == ()


def test_isolated_documents_can_be_added_to_a_store(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "run.zarr"
    packing = {"length": 24, "bos": None, "isolate": True}
    flexcache.capture(model, None, DOCUMENTS, path, layers=[1], packing=packing, **QUIET)
    new = [{**item, "id": f"new-{item['id']}"} for item in DOCUMENTS]
    store = flexcache.extend(model, None, path, new, progress=False)
    for item in DOCUMENTS:
        first, second = (store.read("resid_post", 1, store.rows(document=f"{n}{item['id']}")) for n in ("", "new-"))
        assert np.allclose(first, second, atol=2e-5)
    assert all(item.equal for item in flexcache.recompute(model, path, units=100))


@pytest.mark.parametrize(
    ("family", "found"),
    [("opt", "changes with the document in front of it"), ("bloom", "no position_ids"), ("bert", "changes with")],
)
def test_a_model_that_does_not_isolate_documents_is_refused(family: str, found: str, tmp_path: Path) -> None:
    packing = {"length": 24, "bos": 1, "isolate": True}
    with pytest.raises(ConfigError, match=f"keep packed documents apart[\\s\\S]*{found}"):
        flexcache.capture(tiny(family), None, DOCUMENTS, tmp_path / "run.zarr", packing=packing, **QUIET)
    assert not (tmp_path / "run.zarr").exists()


APART = {
    *(
        "llama",
        "gpt2",
        "gpt_neox",
        "gpt_neox_sequential",
        "gptj",
        "qwen3",
        "gemma3",
        "olmo2",
        "glm4",
        "phi3",
        "mixtral",
    ),
    *("granite", "mistral", "qwen2", "gemma", "gemma2", "olmo", "exaone4", "smollm3", "phi", "stablelm"),
    *("stablelm_parallel", "starcoder2", "gpt_bigcode", "gpt_bigcode_heads", "gpt_neo", "codegen", "cohere", "cohere2"),
    *("nemotron", "persimmon", "helium", "qwen3_moe", "olmoe", "deepseek_v3"),
}
"""Families that isolate packed documents, as listed in docs/configuration.md."""
OTHERS = {"albert", "t5", "t5_encoder"}
"""Families without one stack of blocks, or with relative positions of an encoder."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted({*FAMILIES} - OTHERS))
def test_families_isolate_documents_as_documented(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    spec = CaptureSpec.model_validate({"sites": {"resid_post": "all"}})
    shown = nullcontext() if family in APART else pytest.raises(ConfigError, match="keep packed documents apart")
    with evaluation_mode(model), closing(ModelParallelGroup(model)) as group, shown:
        check_isolation(model, find_targets(model, spec), 0, group)


def test_a_forward_of_isolated_documents_gets_positions_and_no_mask() -> None:
    tokens = (np.arange(5, 12, dtype=np.int32), np.arange(3, dtype=np.int32))
    begins = (np.array([0, 3, 4]), np.array([0]))
    batch = unplanned_batch(tokens, begins=begins)
    given = batch.inputs(pad=9, width=8)
    assert given["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 9], [0, 1, 2, 9, 9, 9, 9, 9]]
    assert given["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert set(given) == {"input_ids", "position_ids"}
    second = split(batch, 7)[1]
    assert second.inputs()["position_ids"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": {}}, "packing needs a length"),
        ({"packing": {"length": 100}, "max_length": 50}, "would be longer than max_length"),
        ({"packing": {"length": 16}}, "eos token, which is not known"),
        ({"packing": {"length": 16, "separator": 2}, "rows": "last"}, "all of their tokens are rows"),
        ({"packing": PACKING, "windows": {"length": 8}}, "no windows"),
        ({"packing": {"lenght": 16}}, "did you mean length"),
        ({"packing": {"length": 16, "isolate": True, "separator": 2}}, "no token would attend to it"),
    ],
)
def test_invalid_packing_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_store(tmp_path / "run.zarr", DOCUMENTS, **options)
    assert not (tmp_path / "run.zarr").exists()
