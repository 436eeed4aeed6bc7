"""Long documents in windows: one row for every token, of the first window that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexcache
from flexcache.errors import ConfigError, DocumentsError
from flexcache.sequences.segmentation import SlidingWindows
from tests.corpora import build_store, lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents([61, 3, 12, 13, 40, *lengths(30, longest=30)], vocabulary=VOCABULARY)
QUIET = {"progress": False, "batch_tokens": 64}
WINDOWS = {"length": 12, "stride": 5}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@given(st.data())
def test_every_chosen_token_is_a_row_of_the_first_window_that_has_it(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 9))
    stride = data.draw(st.integers(1, length))
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    masks = [data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)) for n in sizes]
    windows = SlidingWindows(length, stride)
    for size, mask in zip(sizes, masks):
        windows.append_documents(np.array([size]), None if mask is None else np.array(mask))
    expected = []
    for document, (size, mask) in enumerate(zip(sizes, masks)):
        rows = [at for at in range(size) if mask is None or mask[at]]
        seen: set[int] = set()
        for start in range(0, size, stride):
            tokens = range(start, min(start + length, size))
            new = [at for at in rows if at in tokens and at not in seen]
            if new:
                expected.append((document, start, len(tokens), rows.index(new[0]), len(new)))
            seen |= set(tokens)
            if tokens.stop == size:
                break
    found = windows.segments(np.arange(len(windows.lengths)))
    columns = (found.document, found.start, found.length, found.first_row, found.rows)
    assert list(zip(*(column.tolist() for column in columns))) == expected
    assert windows.linked.tolist() == [i > 0 and expected[i][0] == expected[i - 1][0] for i in range(len(expected))]


def window_states(model: torch.nn.Module, tokens: list[int], length: int, stride: int) -> np.ndarray:
    """The state after block 2 of each token, in the first window that has it, each window run alone."""
    states: list[torch.Tensor] = []
    for start in range(0, len(tokens), stride):
        with torch.no_grad():
            out = model(torch.tensor([tokens[start : start + length]]), output_hidden_states=True).hidden_states[2][0]
        states += [*out[len(states) - start :]]
        if start + length >= len(tokens):
            break
    return torch.stack(states).numpy()


@pytest.mark.parametrize("rows", ["all", "last", {"every": 3}])
def test_rows_equal_the_models_output_on_each_window(rows: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    store = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "run.zarr", layers=[1], rows=rows, windows=WINDOWS, **QUIET
    )
    assert store.plan["truncated_documents"] == 0
    tokens = {item["id"]: item["tokens"] for item in DOCUMENTS}
    for line, name in enumerate(store.documents["id"].to_pylist()):
        size = len(tokens[name])
        chosen = {"all": range(size), "last": [size - 1]}.get(str(rows), range(0, size, 3))
        held = store.rows(document=name)
        assert store.coordinates["position"].values[held].tolist() == list(chosen)
        assert store.coordinates["token_id"].values[held].tolist() == [tokens[name][at] for at in chosen]
        assert (store.coordinates["document"].values[held] == line).all()
        expected = window_states(model, tokens[name], **WINDOWS)[list(chosen)]
        assert np.allclose(store.read("resid_post", 1, held), expected, atol=2e-5)
    assert store.tokens["start"].to_numpy().max() > 0
    assert not store.replayable
    assert "rows" in store.replayable.reasons


def test_documents_stay_in_one_piece_across_batches_and_units(tmp_path: Path) -> None:
    store = build_store(
        tmp_path / "run.zarr",
        token_documents([700, *lengths(150)]),
        batch_tokens=64,
        windows={"length": 8, "stride": 4},
    )
    table = store.documents
    assert table["row_start"].to_pylist() == (np.cumsum(table["n_rows"]) - table["n_rows"].to_numpy()).tolist()
    assert table["n_rows"].to_pylist() == table["n_tokens"].to_pylist()
    straddling = store.coordinates["document"].values.reshape(-1)[store.shard_rows - 1 :: store.shard_rows]
    assert len(straddling) > 5
    position = store.coordinates["position"].values
    for start, count in zip(table["row_start"].to_pylist(), table["n_rows"].to_pylist()):
        assert position[start : start + count].tolist() == list(range(count))


def test_windows_longer_than_every_document_change_nothing(tmp_path: Path) -> None:
    plain = build_store(tmp_path / "plain.zarr")
    windowed = build_store(tmp_path / "windowed.zarr", windows={"length": 64, "stride": 32})
    assert shard_hashes(plain.path) == shard_hashes(windowed.path)
    assert plain.tokens.equals(windowed.tokens)


def test_documents_added_to_a_store_are_split_into_windows_too(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "run.zarr"
    new = [{**d, "id": f"new-{d['id']}"} for d in DOCUMENTS]
    flexcache.capture(model, None, DOCUMENTS, path, layers=[1], windows=WINDOWS, **QUIET)
    with pytest.raises(DocumentsError, match="other contents"):
        flexcache.extend(model, None, path, [{**DOCUMENTS[0], "tokens": [5] * 61}], progress=False)
    store = flexcache.extend(model, None, path, [*DOCUMENTS, *new], new_only=True, progress=False)
    assert store.documents.num_rows == 2 * len(DOCUMENTS)
    for item in (DOCUMENTS[0], new[0]):
        expected = window_states(model, item["tokens"], **WINDOWS)
        assert np.allclose(store.read("resid_post", 1, store.rows(document=item["id"])), expected, atol=2e-5)
    assert flexcache.verify(path).sound
    assert all(item.equal for item in flexcache.recompute(model, path, units=100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": {}, "max_length": None}, "windows need a length"),
        ({"windows": {"length": 12, "stride": 13}}, "leaves tokens out"),
        ({"windows": {"length": 200}, "max_length": 100}, "would be longer than max_length"),
        ({"windows": {"lenght": 200}}, "did you mean length"),
        ({"windows": {"length": 12}, "rows": "mean"}, "mean over a document"),
    ],
)
def test_invalid_windows_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_store(tmp_path / "run.zarr", **options)
    assert not (tmp_path / "run.zarr").exists()
