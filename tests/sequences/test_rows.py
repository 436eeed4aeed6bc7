"""The choice of tokens that become rows, and the labels of single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexcache
from analysis.dataset import targets
from analysis.dataset.probe_dataset import build_dataset
from flexcache.errors import ConfigError, DocumentsError, StoreError
from flexcache.sequences.choice import keep_one_token
from flexcache.store.read.row_alignment import rows_in
from tests.corpora import build_store, expected_rows, lengths, token_documents
from tests.models import VOCABULARY, tiny

DOCUMENTS = token_documents(lengths(60, longest=30), vocabulary=VOCABULARY)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def kept(store: flexcache.Store) -> dict[str, list[int]]:
    """The positions of the rows of each document."""
    position = store.coordinates["position"].values
    return {name: position[store.rows(document=name)].tolist() for name in store.documents["id"].to_pylist()}


def check_values(store: flexcache.Store) -> None:
    for layer in store.layers("resid_post"):
        assert np.allclose(store.read("resid_post", layer), expected_rows(store, layer, 24), rtol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_third_token_is_kept_with_its_own_activation(dtype: str, tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS, rows={"every": 3}, dtype="float32")
    assert kept(store) == {item["id"]: list(range(0, len(item["tokens"]), 3)) for item in DOCUMENTS}
    check_values(store)
    assert store.spec.rows == "some"
    model = tiny("llama")
    options: dict[str, Any] = {"layers": [2], "dtype": dtype, "batch_tokens": 128, "progress": False}
    some = flexcache.capture(model, None, DOCUMENTS, tmp_path / "some.zarr", rows={"every": 3}, **options)
    whole = flexcache.capture(model, None, DOCUMENTS, tmp_path / "whole.zarr", **options)
    assert np.allclose(some.read("resid_post", 2), whole.read("resid_post", 2, rows_in(whole, some)), atol=1e-3)
    assert np.array_equal(rows_in(some, some), np.arange(some.n_rows))
    assert not some.replayable
    assert all(item.equal for item in flexcache.recompute(model, some.path, units=100))


def test_the_fraction_of_a_document_does_not_depend_on_other_documents(tmp_path: Path) -> None:
    rows = {"fraction": 0.3, "seed": 5}
    one = kept(build_store(tmp_path / "one.zarr", DOCUMENTS, rows=rows))
    other = kept(build_store(tmp_path / "other.zarr", DOCUMENTS[::-1], rows=rows))
    assert one == other
    share = sum(map(len, one.values())) / sum(len(item["tokens"]) for item in DOCUMENTS)
    assert 0.22 < share < 0.38
    assert kept(build_store(tmp_path / "seed.zarr", DOCUMENTS, rows={"fraction": 0.3, "seed": 6})) != one


def test_documents_without_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    documents = [{**item, "keep": [at > 20 for at in range(len(item["tokens"]))]} for item in DOCUMENTS]
    store = build_store(tmp_path / "run.zarr", documents, rows={"mask": "keep"})
    long = {item["id"]: list(range(21, len(item["tokens"]))) for item in DOCUMENTS if len(item["tokens"]) > 21}
    assert kept(store) == long
    assert store.plan["rowless_documents"] == len(DOCUMENTS) - len(long) > 0
    check_values(store)
    with pytest.raises(DocumentsError, match="60 without rows"):
        build_store(
            tmp_path / "none.zarr", [{**d, "keep": [0] * len(d["tokens"])} for d in documents], rows={"mask": "keep"}
        )


@pytest.mark.parametrize("take", ["last", "first", "mean"])
def test_one_row_is_kept_of_the_chosen_tokens(take: str, tmp_path: Path) -> None:
    documents = [{**item, "spans": [{"start": 1, "end": 4}, {"start": 6, "end": 8}]} for item in DOCUMENTS]
    store = build_store(
        tmp_path / "run.zarr", documents, rows={"token_spans": "spans", "take": take}, dtype="float32", layers=[3]
    )
    tokens = {item["id"]: item["tokens"] for item in DOCUMENTS if len(item["tokens"]) > 1}
    assert set(store.documents["id"].to_pylist()) == set(tokens)
    for row, name in enumerate(store.documents["id"].to_pylist()):
        places = np.array([at for at in (1, 2, 3, 6, 7) if at < len(tokens[name])])
        values = np.array(tokens[name])[places, None] * 0.37 + places[:, None] * 1.7 + 93 + np.arange(24) * 0.01
        expected = {"last": values[-1], "first": values[0], "mean": values.mean(0)}[take]
        assert np.allclose(store.read("resid_post", 3, [row])[0], expected, rtol=1e-5)


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=6))
def test_the_first_or_last_kept_token_of_each_document_is_found(masks: list[list[bool]]) -> None:
    sizes = np.array([len(mask) for mask in masks])
    flat = np.array([value for mask in masks for value in mask], bool)
    for rows, end in (("first", 0), ("last", -1)):
        found = keep_one_token(flat, sizes, rows)
        expected = [
            [i == [j for j, v in enumerate(m) if v][end] for i in range(len(m))] if any(m) else [False] * len(m)
            for m in masks
        ]
        assert found is not None
        assert found.tolist() == [value for mask in expected for value in mask]


TEXTS = [
    {"id": "a", "text": "the quick brown fox", "tags": [0, 1, 2, 3, 4, 5],
     "spans": [{"start": 6, "end": 11, "label": "colour"}]},
    {"id": "b", "text": "over the lazy dog", "spans": [], "tags": [9, 8, 7, 6, 5, 4]},
    {"id": "c", "text": "fox jumps", "spans": [{"start": 0, "end": 3, "label": "animal"}], "tags": [0, 0, 1, 0]},
]  # fmt: skip


def test_special_tokens_are_dropped_and_spans_of_characters_are_kept(tokenizer: Any, tmp_path: Path) -> None:
    plain = kept(build_store(tmp_path / "plain.zarr", TEXTS, tokenizer=tokenizer, rows={"specials": False}))
    assert plain == {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4], "c": [1, 2]}
    spans = build_store(tmp_path / "spans.zarr", TEXTS, tokenizer=tokenizer, rows={"character_spans": "spans"})
    assert kept(spans) == {"a": [2, 3], "c": [1]}
    check_values(spans)


def test_labels_of_tokens_are_in_the_table_and_are_targets(tokenizer: Any, tmp_path: Path) -> None:
    store = build_store(
        tmp_path / "run.zarr", TEXTS, tokenizer=tokenizer, token_labels=["spans", "tags"], rows={"every": 2}
    )
    assert store.token_labels == ("spans", "tags")
    assert "tags" not in store.documents.column_names
    expected = {"a": [0, 2, 4], "b": [9, 7, 5], "c": [0, 1]}
    names = [None, None, "colour", "colour", None, None]
    tags, spans = (store.token_label(name).to_pylist() for name in ("tags", "spans"))
    for name, values in expected.items():
        assert [tags[row] for row in store.rows(document=name)] == values
    assert [spans[row] for row in store.rows(document="a")] == names[::2]
    [target] = targets.read(store, "tags")
    dataset = build_dataset(store, "resid_post", target)
    assert dataset.rows == "all"
    assert sorted(dataset.classes) == sorted({0, 2, 4, 9, 7, 5, 1})
    with pytest.raises(StoreError, match="did you mean tags"):
        store.token_label("tag")


def test_labels_follow_windows_and_truncation(tmp_path: Path) -> None:
    documents = [{**item, "at": list(range(len(item["tokens"])))} for item in DOCUMENTS]
    for number, options in enumerate(({"windows": {"length": 7, "stride": 3}}, {"max_length": 9}, {})):
        store = build_store(tmp_path / f"{number}.zarr", documents, token_labels=["at"], **options)
        assert store.token_label("at").to_pylist() == store.coordinates["position"].values.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": {"mask": "kep"}}, "did you mean keep"),
        ({"rows": {"mask": "score"}}, "holds no lists"),
        ({"rows": {"mask": "short"}}, "one entry for each token"),
        ({"rows": {"mask": "words"}}, "is not a mask"),
        ({"rows": {"token_spans": "keep"}}, "holds no spans"),
        ({"rows": {"token_spans": "wrong"}}, "has an invalid span"),
        ({"rows": {"character_spans": "spans"}}, "the documents are tokens"),
        ({"token_labels": ["spans"]}, "have no label"),
        ({"token_labels": ["nothing"]}, "no column 'nothing'"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_document(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    document = {
        "id": "a", "tokens": [4, 5, 6], "keep": [True, False, True], "score": 1.0, "short": [1], "words": [1, 2, 3],
        "spans": [{"start": 0, "end": 1}], "wrong": [{"start": 2, "end": 1}],
    }  # fmt: skip
    with pytest.raises(DocumentsError, match=message):
        build_store(tmp_path / "run.zarr", [document], **options)
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("lasst", "key 'rows'"),
        (3, "key 'rows'"),
        ({"evry": 3}, "did you mean every"),
        ({"every": 0}, "key 'every'"),
        ({"every": 2, "take": "most"}, "cannot take 'most'"),
        ({"specials": False}, "not known which they are"),
    ],
)
def test_invalid_rules_are_refused(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_store(tmp_path / "run.zarr", DOCUMENTS, rows=rows)


def test_a_truncated_text_keeps_the_special_tokens_at_its_end(tokenizer: Any, tmp_path: Path) -> None:
    text = " ".join(["w"] * 9)
    store = build_store(tmp_path / "run.zarr", [{"id": "a", "text": text}], tokenizer=tokenizer, max_length=5)
    found = store.tokens["tokens"][0].as_py()
    assert found == tokenizer(text, truncation=True, max_length=5).input_ids
    assert (found[0], found[-1], len(found)) == (1, 2, 5)
