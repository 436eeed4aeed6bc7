"""A corpus of several segments is captured while it is planned, and its store is that of a whole plan."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.array_spec import ArraySpec
from flexcache.errors import CaptureError, DocumentsError, MismatchError
from flexcache.recording.planning import store_plan
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_plan import BackgroundPlan, plan_store
from flexcache.recording.run.recorder import Recorder
from flexcache.spec import CaptureSpec
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents(lengths(240, longest=30), vocabulary=VOCABULARY)
ARRAYS = [ArraySpec("resid_post", "resid_post", (0, 2), 4, 8, "hidden", "float32")]
KINDS: dict[str, dict[str, Any]] = {
    "whole documents": {},
    "batches of equal lengths": {"batching": "equal_lengths"},
    "single sequences": {"batching": "single"},
    "last tokens": {"rows": "last"},
    "means": {"rows": "mean"},
    "chosen tokens": {"rows": {"every": 3}},
    "windows": {"windows": {"length": 8, "stride": 4}},
    "windows and chosen tokens": {"windows": {"length": 8, "stride": 4}, "rows": {"every": 3}},
    "packed": {"packing": {"length": 16, "separator": 2, "bos": 1}},
    "packed and isolated": {"packing": {"length": 16, "separator": None, "bos": 1, "isolate": True}},
    "a number of tokens": {"max_tokens": 2500},
    "no texts": {"keep_text": False},
}
SEGMENT = 400


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def plan_of(documents: Any = DOCUMENTS, batch_rows: int = 7, **options: Any) -> PlanInputs:
    batching = options.pop("batching", "padded")
    spec = CaptureSpec(sites=["resid_post"], **{"batch_tokens": 64, "segment_tokens": SEGMENT, **options})
    corpus = flexcache.open_documents(documents, batch_rows=batch_rows)
    return PlanInputs(corpus, None, ARRAYS, spec, {"name": "none"}, {}, batching=batching)


def content(path: Path) -> dict[str, str]:
    """Return a hash of each file, without the metadata, which has the time at which a store was created."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.relative_to(path).parts[0] not in ("zarr.json", "README.md", "runs", "ledger")
    }


def grow(path: Path, inputs: PlanInputs, parts: int | None = None) -> list[int]:
    """Plan a store in parts, stop after some of them, and return the rows of each."""
    planned = store_plan._plan_parts(path, inputs, lambda *_: None, lambda: None, lambda: False, grows=True)
    rows = []
    for amount in planned:
        rows.append(amount.rows)
        store = flexcache.open(path)
        assert store.n_rows == amount.rows
        assert len(store.documents) == store.plan["documents"]
        assert flexcache.verify(path).sound
        if len(rows) == parts:
            planned.close()
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_grew_has_the_bytes_of_one_made_as_a_whole(kind: str, tmp_path: Path) -> None:
    plan_store(tmp_path / "whole.zarr", plan_of(**KINDS[kind]))
    rows = grow(tmp_path / "grown.zarr", plan_of(**KINDS[kind]))
    whole, grown = flexcache.open(tmp_path / "whole.zarr"), flexcache.open(tmp_path / "grown.zarr")
    assert len(rows) > 2, "the plan has not grown"
    assert rows == sorted(rows)
    assert content(grown.path) == content(whole.path)
    assert grown.plan == whole.plan
    assert not grown.growing


@settings(max_examples=6, deadline=None)
@given(batch_rows=st.integers(1, 60), segment=st.integers(50, 1500), stops=st.lists(st.integers(1, 3), max_size=2))
def test_a_plan_that_is_stopped_and_taken_over_has_the_same_bytes(
    batch_rows: int, segment: int, stops: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("plans")
    plan_store(folder / "whole.zarr", plan_of(batch_rows=batch_rows, segment_tokens=segment))
    for parts in [*stops, None]:
        grow(folder / "grown.zarr", plan_of(batch_rows=batch_rows, segment_tokens=segment), parts)
    assert content(folder / "grown.zarr") == content(folder / "whole.zarr")
    assert flexcache.open(folder / "grown.zarr").plan == flexcache.open(folder / "whole.zarr").plan


def test_every_earlier_plan_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    plan_store(tmp_path / "whole.zarr", plan_of())
    whole = flexcache.open(tmp_path / "whole.zarr")
    for parts in (1, 2, 3):
        path = tmp_path / f"{parts}.zarr"
        grow(path, plan_of(), parts)
        store = flexcache.open(path)
        assert store.growing
        assert not store.complete
        assert store.n_rows < whole.n_rows
        assert store.n_rows % store.shard_rows == 0
        assert store.tokens.equals(whole.tokens.slice(0, len(store.tokens)))
        for name, values in store.coordinates.items():
            assert np.array_equal(values.values, whole.coordinates[name].values[: store.n_rows])
        ends = store.documents["row_start"].to_numpy() + store.documents["n_rows"].to_numpy()
        assert ends[-1] == store.n_rows


def test_a_reader_of_an_earlier_plan_reads_its_rows_while_the_plan_grows(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    grow(path, plan_of(), 1)
    early, documents = flexcache.open(path), flexcache.open(path).documents
    grow(path, plan_of())
    assert early.documents.equals(documents)
    assert len(early.rows()) == early.n_rows
    assert early.tokens.equals(flexcache.open(path).tokens.slice(0, len(early.tokens)))


def test_a_corpus_of_one_segment_is_sized_as_before(tmp_path: Path) -> None:
    """The default segment leaves the specs and stores of small corpora as they were."""
    assert "segment_tokens" not in CaptureSpec().model_dump(mode="json")
    plan_store(tmp_path / "default.zarr", plan_of(segment_tokens=CaptureSpec().segment_tokens))
    assert grow(tmp_path / "one.zarr", plan_of(segment_tokens=10**6)) == [flexcache.open(tmp_path / "one.zarr").n_rows]
    assert content(tmp_path / "one.zarr") == content(tmp_path / "default.zarr")


def sizes(path: Path) -> tuple[int, int]:
    store = flexcache.open(path)
    return store.n_rows, store.shard_rows


def test_units_are_sized_by_the_first_segment_and_the_number_of_documents(tmp_path: Path) -> None:
    """A document at the end that would make units larger comes too late to do so; a generator is sized as a whole."""
    long = [*DOCUMENTS, {"id": "long", "tokens": [5] * 500, "label": "even", "score": 1.0}]
    plan_store(tmp_path / "segments.zarr", plan_of(long))
    plan_store(tmp_path / "generator.zarr", plan_of(iter(long)))
    assert sizes(tmp_path / "generator.zarr")[1] == 4096
    assert sizes(tmp_path / "segments.zarr") == (sizes(tmp_path / "generator.zarr")[0], 256)


# Captures


class Gate:
    """Documents that are read on only when units were captured meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.units: list[tuple[int, bool]] = []
        commit, tokenizing = Recorder.commit_unit, store_plan.tokenizing

        def committed(recorder: Recorder, *arguments: Any) -> bool:
            assert recorder.unit_writer.unit is not None
            self.units.append((recorder.unit_writer.unit, recorder.store.growing))
            done = commit(recorder, *arguments)
            self.open.set()
            return done

        def gated(inputs: Any, documents: Any, folder: Any, progress: Any) -> Iterator[Any]:
            for corpus in tokenizing(inputs, documents, folder, progress):
                yield corpus
                if threading.current_thread() is not threading.main_thread():
                    assert self.open.wait(60), "no unit was captured while the rest was planned"

        monkeypatch.setattr(Recorder, "commit_unit", committed)
        monkeypatch.setattr(store_plan, "tokenizing", gated)


def capture(path: Path, documents: Any = DOCUMENTS, batch_rows: int = 7, **options: Any) -> flexcache.Store:
    given = {"layers": [1, 3], "batch_tokens": 64, "segment_tokens": SEGMENT, "progress": False, **options}
    corpus = flexcache.open_documents(documents, batch_rows=batch_rows)
    return flexcache.capture(tiny("llama"), None, corpus, path, **given)


def test_units_are_captured_while_the_rest_is_planned_and_the_store_is_that_of_a_whole_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_plan, "size_of_units", lambda *_: None)
        whole = capture(tmp_path / "whole.zarr")
    gate = Gate(monkeypatch)
    store = capture(tmp_path / "run.zarr")
    assert store.complete
    assert store.plan == whole.plan
    assert content(store.path) == content(whole.path)
    assert list(store.ledger) == list(whole.ledger)
    assert flexcache.verify(store.path).sound
    assert gate.units[0] == (0, True)
    assert gate.units[-1][1] is False
    assert sorted(unit for unit, _ in gate.units) == list(range(whole.n_units))
    assert not list(tmp_path.glob(".*")), "files of the planner are left"


def test_an_error_in_a_late_document_names_it_and_committed_units_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"
    whole = capture(tmp_path / "whole.zarr")
    bad = [*DOCUMENTS[:-1], {**DOCUMENTS[-1], "tokens": [VOCABULARY]}]
    gate = Gate(monkeypatch)
    for _ in range(2):
        with pytest.raises(DocumentsError, match=r"doc-239"):
            capture(path, bad)
    store = flexcache.open(path)
    assert gate.units
    assert "not planned yet" in repr(store)
    assert store.growing
    assert not store.complete
    assert len(store.committed_units) > 0
    assert flexcache.verify(path).sound
    rows = store.committed_rows
    assert np.array_equal(store.read("resid_post", 1, rows), whole.read("resid_post", 1, rows))
    with pytest.raises(flexcache.errors.StoreError, match="documents that are not planned yet"):
        flexcache.extend(tiny("llama"), None, DOCUMENTS, path, progress=False)
    with pytest.raises(flexcache.errors.StoreError, match="documents of the store are not planned yet"):
        flexcache.Removal(path, layers=[1]).run()


def test_a_repeated_id_in_another_segment_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match="doc-0"):
        capture(tmp_path / "run.zarr", [*DOCUMENTS, DOCUMENTS[0]])


def test_a_store_whose_plan_is_unfinished_is_resumed_by_the_same_call_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "run.zarr", capture(tmp_path / "whole.zarr")

    def failing(self: Recorder, unit: int) -> Any:
        raise CaptureError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "begin_unit", failing)
        patch.setattr(store_plan, "GROWTH", 10**9)
        patch.setattr(BackgroundPlan, "_finish", lambda self, parts: parts.close())
        with pytest.raises(CaptureError, match="stopped here"):
            capture(path)
    assert flexcache.open(path).growing
    with pytest.raises(MismatchError, match=r"segment_tokens: 400 in the store, 500 now"):
        capture(path, segment_tokens=500)
    assert capture(path).complete
    assert shard_hashes(path) == shard_hashes(whole.path)
    assert content(path) == content(whole.path)


def test_labels_without_a_value_in_the_first_segment_get_the_type_of_later_ones(tmp_path: Path) -> None:
    late = [{**document, "late": None if n < 200 else n} for n, document in enumerate(DOCUMENTS)]
    store = capture(tmp_path / "run.zarr", late)
    assert store.documents.schema.field("late").type == pa.int64()
    order = store.documents["source_index"].to_pylist()
    assert store.documents["late"].to_pylist() == [late[n]["late"] for n in order]
