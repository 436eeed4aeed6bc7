"""Arrow types of all kinds as text, ids, tokens and labels; tables of other libraries."""

from __future__ import annotations

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flexcache.documents import open_documents
from flexcache.documents.arrow_types import can_be_stored, stored_array, stored_type
from flexcache.errors import DocumentsError
from tests.corpora import build_store

VIEW = pa.string_view()
DICTIONARY = pa.dictionary(pa.int8(), pa.string())
CONVERTED = {
    "string view": (pa.array(["a", None, "c"], VIEW), pa.string()),
    "binary view": (pa.array([b"a", None, b"c"], pa.binary_view()), pa.binary()),
    "run-end encoded": (pc.run_end_encode(pa.array(["a", "a", None])), pa.string()),
    "dictionary": (pa.array(["a", None, "a"]).dictionary_encode(), pa.string()),
    "list view": (pa.array([["a"], None, ["b", None]], pa.list_view(VIEW)), pa.list_(pa.string())),
    "large list view": (pa.array([[1], None, [2, 3]], pa.large_list_view(pa.int8())), pa.large_list(pa.int8())),
    "list": (pa.array([["a"], None, ["b", None]], pa.list_(DICTIONARY)), pa.list_(pa.string())),
    "fixed-size list": (pa.array([["a", "b"], None, ["c", None]], pa.list_(VIEW, 2)), pa.list_(pa.string(), 2)),
    "struct": (
        pa.array([{"a": "x", "b": ["y"]}, None, {"a": None}], pa.struct([("a", VIEW), ("b", pa.list_(VIEW))])),
        pa.struct([("a", pa.string()), ("b", pa.list_(pa.string()))]),
    ),
    "map": (pa.array([[("k", "v")], None, [("a", None)]], pa.map_(VIEW, VIEW)), pa.map_(pa.string(), pa.string())),
    "extension": (
        pa.ExtensionArray.from_storage(pa.json_(VIEW), pa.array(['{"a": 1}', None, "2"], VIEW)),
        pa.string(),
    ),
}
KEPT: dict[str, pa.Array] = {
    "half": pa.array([np.float16(1.5), None, None], pa.float16()),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "decimal": pa.array([decimal.Decimal("1.50"), None, None]),
    "small decimal": pa.array([decimal.Decimal("1.50"), None, None], pa.decimal32(5, 2)),
    "duration": pa.array([datetime.timedelta(1), None, None], pa.duration("s")),
    "time": pa.array([datetime.time(1, 2, 3), None, None], pa.time32("s")),
    "timestamp": pa.array([datetime.datetime(2020, 1, 2), None, None], pa.timestamp("ns", tz="Europe/Berlin")),
    "uuid": pa.array([uuid.UUID(int=5).bytes, None, None], pa.uuid()),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int64(), (2,)), pa.array([[1, 2], None, None], pa.list_(pa.int64(), 2))
    ),
    "large string": pa.array(["a", None, "b"], pa.large_string()),
    "null": pa.nulls(3),
}
EMPTY = {
    "struct": (pa.array([{}, None, {}], pa.struct([])), pa.null(), [None, None, None]),
    "in a struct": (
        pa.array([{"a": {}}, None, {"a": None}], pa.struct([("a", pa.struct([]))])),
        pa.struct([("a", pa.null())]),
        [{"a": None}, None, {"a": None}],
    ),
    "in a list": (pa.array([[{}], None, []], pa.list_(pa.struct([]))), pa.list_(pa.null()), [[None], None, []]),
    "in a map": (
        pa.array([[("k", {})], None, []], pa.map_(pa.string(), pa.struct([]))),
        pa.map_(pa.string(), pa.null()),
        [[("k", None)], None, []],
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_types_without_a_parquet_type_are_converted_to_one_that_has_it(name: str) -> None:
    array, kind = CONVERTED[name]
    for part in (array, array.slice(1), array.slice(1, 1), array.slice(0, 0)):
        found = stored_array(part)
        found.validate(full=True)
        assert found.type == stored_type(array.type) == kind
        assert found.to_pylist() == part.to_pylist()
    assert can_be_stored(kind)


def test_labels_of_every_type_are_read_back_from_a_store(tmp_path: Path) -> None:
    columns = {name: array for name, (array, _) in CONVERTED.items()} | KEPT
    columns |= {f"empty {name}": array for name, (array, _, _) in EMPTY.items()}
    expected = {name: columns[name].to_pylist() for name in [*CONVERTED, *KEPT]}
    expected |= {f"empty {name}": values for name, (_, _, values) in EMPTY.items()}
    table = pa.table({"id": pa.array(["a", "b", "c"], VIEW), "tokens": [[5], [6], [7]], **columns})
    whole = pa.concat_tables([table, table.set_column(0, "id", pa.array(["d", "e", "f"], VIEW))])
    found = build_store(tmp_path / "run.zarr", open_documents(whole, batch_rows=2)).documents
    places = np.argsort(found["source_index"].to_numpy())
    for name, values in expected.items():
        assert found[name].take(places).to_pylist() == values + values, name


def test_a_type_that_no_store_can_keep_is_refused_before_any_document_is_read() -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])
    for array in (union, pa.array([(1, 2, 3)], pa.month_day_nano_interval())):
        table = pa.table({"text": ["a"], "n": [1], "x": array})
        with pytest.raises(DocumentsError, match=r"'x' has a type that a store cannot keep") as caught:
            open_documents(table)
        assert "labels=['n']" in str(caught.value)
        assert open_documents(table, labels=["n"]).labels == ("n",)


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["ab"], VIEW),
        pc.run_end_encode(pa.array(["ab"])),
        pa.array(["ab"]).dictionary_encode(),
        pa.array(["ab"], pa.large_string()),
    ],
)
def test_text_and_ids_of_every_text_type_are_read(array: pa.Array, tmp_path: Path) -> None:
    (batch,) = open_documents(pa.table({"id": array, "text": array})).batches()
    assert batch.to_pydict() == {"id": ["ab"], "text": ["ab"]}


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (pa.array([decimal.Decimal(5)], pa.decimal128(5, 0)), "5"),
        (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
        (pa.array([uuid.UUID(int=5).bytes], pa.uuid()), str(uuid.UUID(int=5))),
    ],
)
def test_whole_numbers_and_uuids_of_every_type_are_ids(array: pa.Array, name: str) -> None:
    (batch,) = open_documents(pa.table({"id": array, "text": ["x"]})).batches()
    assert batch["id"].to_pylist() == [name]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_view(pa.int64()),
        pa.large_list_view(pa.int16()),
        pa.list_(pa.uint8(), 2),
        pa.list_(pa.dictionary(pa.int8(), pa.int64())),
        pa.list_(pa.uint64()),
    ],
)
def test_tokens_of_every_list_type_are_read(kind: pa.DataType) -> None:
    (batch,) = open_documents(pa.table({"tokens": pa.array([[1, 2], [3, 4]], kind)})).batches()
    assert batch["tokens"].to_pylist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", [pa.list_(VIEW, 2), pa.list_view(VIEW), pa.large_list(DICTIONARY)])
def test_labels_of_tokens_of_every_list_type_are_read(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"tokens": [[5, 6], [7, 8]], "tag": pa.array([["u", "v"], ["w", None]], kind)})
    store = build_store(tmp_path / "run.zarr", table, token_labels=["tag"])
    found = dict(zip(store.coordinates["token_id"].values.tolist(), store.token_label("tag").to_pylist()))
    assert found == {5: "u", 6: "v", 7: "w", 8: None}


@pytest.mark.parametrize("column", ["id", "text", "x"])
def test_text_that_is_not_utf_8_is_refused(column: str) -> None:
    offsets, content = pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")
    damaged = pa.Array.from_buffers(pa.string(), 1, [None, offsets, content])
    table = pa.table({"id": ["a"], "text": ["b"], "x": ["c"]}).drop_columns(column).append_column(column, damaged)
    with pytest.raises(DocumentsError, match=f"column {column!r} has values that cannot be read"):
        next(open_documents(table).batches())


def test_a_token_that_is_too_large_for_any_signed_number_is_refused() -> None:
    with pytest.raises(DocumentsError, match="an invalid token id"):
        next(open_documents(pa.table({"tokens": pa.array([[2**64 - 1]], pa.list_(pa.uint64()))})).batches())


def test_parquet_files_with_views_and_plain_strings_are_one_corpus(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["a"], VIEW), "x": pa.array(["q"], VIEW)}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"text": ["b"], "x": pa.array(["r"], pa.large_string())}), tmp_path / "2.parquet")
    found = pa.Table.from_batches(open_documents(tmp_path).batches())
    assert found.select(["text", "x"]).to_pydict() == {"text": ["a", "b"], "x": ["q", "r"]}


class Stream:
    """A table of any library that speaks the Arrow C stream interface."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


def test_readers_and_streams_of_arrow_are_tables() -> None:
    table = pa.table({"id": ["a", "b"], "text": ["x", "y"], "n": [1, 2]})
    for source in (table.to_reader(), table.to_batches()[0], Stream(table)):
        assert pa.Table.from_batches(open_documents(source).batches()) == table
    with pytest.raises(DocumentsError, match="a table that cannot be read"):
        open_documents(pa.chunked_array([["x"]]))


def test_a_data_frame_of_pandas_is_a_table() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"text": ["x", "y"], "kind": pandas.Categorical(["u", None]), "n": pandas.array([1, None], dtype="Int64")}
    )
    for part in (frame, frame[frame.text == "y"]):
        documents = open_documents(part)
        assert documents.labels == ("kind", "n")
        (batch,) = documents.batches()
        assert batch.to_pylist()[-1] == {"id": str(len(part) - 1), "text": "y", "kind": None, "n": None}
    named = open_documents(frame.set_index(pandas.Index(["a", "b"], name="id")))
    assert [name for batch in named.batches() for name in batch["id"].to_pylist()] == ["a", "b"]
    with pytest.raises(DocumentsError, match="a table that cannot be read") as caught:
        open_documents(pandas.DataFrame({"text": ["x", "y"], "mixed": [1, "q"]}))
    assert "mixed" in str(caught.value)
