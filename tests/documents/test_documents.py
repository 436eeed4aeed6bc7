import gzip
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexcache.documents import RESERVED, Documents, open_documents
from flexcache.documents.sources import csv_source
from flexcache.errors import DocumentsError


def table(documents: Documents) -> pa.Table:
    return pa.Table.from_batches(documents.batches(), documents.schema)


def rows(source, **options) -> list[dict]:
    return table(open_documents(source, **options)).to_pylist()


def error_of(source, **options) -> str:
    with pytest.raises(DocumentsError) as caught:
        rows(source, **options)
    return str(caught.value)


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


RECORDS = [
    {"id": "007", "text": "one", "stars": 3, "kind": "a"},
    {"id": "8", "text": 'zwei\n„drei“, "four"', "stars": 4, "kind": "b"},
    {"id": "009", "text": "🦊 five", "stars": 5, "kind": "007"},
]
SCHEMA = pa.schema({"id": pa.string(), "text": pa.string(), "stars": pa.int64(), "kind": pa.string()})


def write(records: list[dict], path: Path) -> Path:
    """Write records in the format that the suffix says, with pyarrow or json: not with the code under test."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, records)
    columns = pa.Table.from_pylist(records)
    (pq.write_table if path.suffix == ".parquet" else pcsv.write_csv)(columns, path)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("batch_rows", [1, 2, 1024])
def test_files_of_every_format_give_the_same_documents_and_types(tmp_path, suffix, batch_rows):
    documents = open_documents(write(RECORDS, tmp_path / f"corpus.{suffix}"), batch_rows=batch_rows)
    assert documents.schema == SCHEMA
    assert table(documents).to_pylist() == RECORDS
    assert [batch.num_rows for batch in documents.batches()] == [min(batch_rows, 3)] * (3 // min(batch_rows, 3)) + (
        [1] if batch_rows == 2 else []
    )
    assert len(documents) == 3
    assert documents.labels == ("stars", "kind")


@pytest.mark.parametrize("source", [RECORDS, iter(RECORDS), tuple(RECORDS), pa.Table.from_pylist(RECORDS)])
def test_python_objects_give_the_same_documents_as_files(source):
    documents = open_documents(source)
    assert documents.schema == SCHEMA
    assert table(documents).to_pylist() == RECORDS


def test_an_object_like_a_hugging_face_dataset_is_read_by_its_iteration():
    class Dataset:
        def __len__(self):
            return len(RECORDS)

        def __iter__(self):
            return iter(RECORDS)

    documents = open_documents(Dataset())
    assert len(documents) == 3
    assert table(documents).to_pylist() == table(documents).to_pylist() == RECORDS


def test_opening_documents_again_returns_them_unchanged():
    documents = open_documents(RECORDS)
    assert open_documents(documents) is documents


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
LISTS = st.lists(st.tuples(TEXT, TEXT), unique_by=lambda pair: pair[0])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LISTS, st.integers(1, 4))
def test_any_ids_and_texts_survive_every_format(tmp_path, pairs, batch_rows):
    records = [{"id": name, "text": text} for name, text in pairs]
    columns = pa.Table.from_pylist(records, pa.schema({"id": pa.string(), "text": pa.string()}))
    pq.write_table(columns, tmp_path / "a.parquet")
    pcsv.write_csv(columns, tmp_path / "a.csv")
    write_jsonl(tmp_path / "a.jsonl", records)
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        assert rows(tmp_path / name, batch_rows=batch_rows) == records
    assert rows(records, batch_rows=batch_rows) == records
    assert rows(iter(records), batch_rows=batch_rows) == records
    assert rows(columns, batch_rows=batch_rows) == records


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 2**31 - 1)), min_size=1), st.integers(1, 4))
def test_any_token_lists_survive_every_format_that_can_hold_them(tmp_path, lists, batch_rows):
    records = [{"id": str(index), "tokens": tokens} for index, tokens in enumerate(lists)]
    columns = pa.table({"tokens": pa.array(lists, pa.list_(pa.uint32()))})
    pq.write_table(columns, tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [{"tokens": tokens} for tokens in lists])
    for source in (tmp_path / "a.parquet", tmp_path / "a.jsonl", columns, records):
        documents = open_documents(source, batch_rows=batch_rows)
        assert documents.schema.field("tokens").type == pa.list_(pa.int32())
        assert table(documents).to_pylist() == records


def test_tokens_may_be_numpy_arrays():
    got = rows([{"tokens": np.array([5, 6], np.int64)}, {"tokens": np.array([7], np.uint16)}])
    assert [row["tokens"] for row in got] == [[5, 6], [7]]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_compressed_files_are_read(tmp_path, kind, suffix):
    plain = write(RECORDS, tmp_path / f"plain.{kind}").read_bytes()
    packed = tmp_path / f"packed.{kind}{suffix}"
    with pa.output_stream(str(packed), compression="detect") as stream:
        stream.write(plain)
    assert packed.read_bytes() != plain
    assert rows(packed) == RECORDS


def test_a_folder_and_a_glob_are_read_in_the_order_of_names(tmp_path):
    for name, record in zip(("b.jsonl", "sub/a.jsonl", "a.jsonl"), RECORDS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [record])
    (tmp_path / "README.md").write_text("no document")
    (tmp_path / ".hidden.jsonl").write_text("no document")
    assert [row["id"] for row in rows(tmp_path)] == ["009", "007", "8"]
    assert [row["id"] for row in rows(tmp_path / "*.jsonl")] == ["009", "007"]
    assert [row["id"] for row in rows([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")])] == ["007", "009"]


def test_a_folder_of_text_files_has_relative_paths_as_ids(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes("ü\r\nz".encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfafter a byte order mark")
    documents = open_documents(tmp_path, text="ignored")
    assert table(documents).to_pylist() == [
        {"id": "a.txt", "text": "after a byte order mark"},
        {"id": "b/one.txt", "text": "ü\r\nz"},
    ]
    assert documents.describe()["files"] == [
        {"name": "a.txt", "bytes": 26},
        {"name": "b/one.txt", "bytes": 5},
    ]


def test_without_an_id_column_the_id_is_the_index_across_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "z"}])
    assert [row["id"] for row in rows(tmp_path, batch_rows=1)] == ["0", "1", "2"]


def test_whole_numbers_are_ids_as_text(tmp_path):
    assert rows([{"id": 7, "text": "x"}, {"id": np.int64(8), "text": "y"}])[1]["id"] == "8"
    assert rows(pa.table({"id": [7], "text": ["x"]}))[0]["id"] == "7"


def test_columns_can_have_other_names_and_labels_can_be_chosen():
    records = [{"key": "a", "body": "x", "one": 1, "two": 2.5}]
    documents = open_documents(records, id="key", text="body", labels=["two"])
    assert documents.schema.names == ["id", "text", "two"]
    assert table(documents).to_pylist() == [{"id": "a", "text": "x", "two": 2.5}]
    assert open_documents(records, id="key", text="body", labels=[]).schema.names == ["id", "text"]


def test_one_of_text_and_tokens_can_be_chosen():
    both = pa.table({"text": ["x"], "tokens": [[1]], "a": [1]})
    assert rows(both, tokens=None, labels=["a"]) == [{"id": "0", "text": "x", "a": 1}]
    assert rows(both, text=None, labels=["a"]) == [{"id": "0", "tokens": [1], "a": 1}]


def test_label_types_of_parquet_are_kept(tmp_path):
    columns = pa.table(
        {
            "text": pa.array(["x", "y"]).dictionary_encode(),
            "half": pa.array([1, None], pa.float32()),
            "day": pa.array([1, 2], pa.date32()),
            "vector": pa.array([[1.0], [2.0, 3.0]]),
            "kind": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    pq.write_table(columns, tmp_path / "a.parquet")
    schema = open_documents(tmp_path / "a.parquet").schema
    assert schema.types == [
        pa.string(),
        pa.string(),
        pa.float32(),
        pa.date32(),
        pa.list_(pa.float64()),
        pa.string(),
    ]


def test_parquet_files_with_other_column_orders_and_widths_are_unified(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"m": ["k"], "n": pa.array([2], pa.int64()), "text": ["y"]}), tmp_path / "b.parquet")
    assert rows(tmp_path) == [
        {"id": "0", "text": "x", "n": 1, "m": None},
        {"id": "1", "text": "y", "n": 2, "m": "k"},
    ]


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        (["1", "", "-3"], [1, None, -3]),
        (["1", "2.5", "1e3"], [1.0, 2.5, 1000.0]),
        (["true", "", "false"], [True, None, False]),
        (["007", "8", "9"], ["007", "8", "9"]),
        (["1", "x", ""], ["1", "x", None]),
        (["12345678901234567890", "1", "2"], ["12345678901234567890", "1", "2"]),
        (["", "", ""], [None, None, None]),
        (["2020-01-01", "2020-01-02", ""], ["2020-01-01", "2020-01-02", None]),
        (["1", "NA", ""], [1, None, None]),
        (["1.5", "NA", "nan"], [1.5, None, pytest.approx(float("nan"), nan_ok=True)]),
        (["true", "NA", "false"], [True, None, False]),
        (["NA", "x", '"NA"'], [None, "x", None]),
    ],
)
def test_csv_labels_get_a_type_only_where_every_filled_field_has_it(tmp_path, fields, values):
    lines = "".join(f"{index},{field}\n" for index, field in enumerate(fields))
    (tmp_path / "a.csv").write_text("text,label\n" + lines)
    got = rows(tmp_path / "a.csv")
    assert [row["text"] for row in got] == ["0", "1", "2"]
    assert [row["label"] for row in got] == values


def test_a_csv_text_longer_than_a_block_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_source, "BLOCK_BYTES", 1000)
    long = "word " * 20_000
    (tmp_path / "a.csv").write_text("text,n\n" + "short,1\n" * 500 + f"{long},2\n" * 3)
    documents = open_documents(tmp_path / "a.csv")
    assert len(documents) == 503
    assert [len(row["text"]) for row in table(documents).to_pylist()] == [5] * 500 + [len(long)] * 3


def test_labels_that_change_their_type_late_are_unified_in_files_and_lists(tmp_path):
    records = [{"text": "x", "score": 1}] * 3 + [{"text": "x", "score": 1.5, "late": "y"}]
    for source in (records, write_jsonl(tmp_path / "a.jsonl", records)):
        got = table(open_documents(source, batch_rows=1))
        assert got.schema.field("score").type == pa.float64()
        assert got["score"].to_pylist() == [1, 1, 1, 1.5]
        assert got["late"].to_pylist() == [None, None, None, "y"]


def test_labels_of_a_generator_that_change_their_type_late_are_refused():
    records = [{"text": "x", "score": 1}] * 3 + [{"text": "x", "score": 1.5}]
    assert "document 3" in error_of(iter(records), batch_rows=2)
    late = [{"text": "x"}] * 3 + [{"text": "x", "late": 1}]
    assert "'late' is missing in the first documents" in error_of(iter(late), batch_rows=2)


def test_a_generator_is_read_lazily_and_once():
    pulled = []

    def generate():
        for index in range(100):
            pulled.append(index)
            yield {"text": str(index)}

    documents = open_documents(generate(), batch_rows=10)
    assert documents.count is None
    with pytest.raises(TypeError, match="no length"):
        len(documents)
    assert documents
    batches = documents.batches()
    next(batches)
    assert len(pulled) <= 20
    assert sum(batch.num_rows for batch in batches) == 90
    with pytest.raises(DocumentsError, match="read already"):
        list(documents.batches())


def test_a_generator_never_has_more_than_a_few_batches_alive():
    alive, most = weakref.WeakSet(), 0

    class Record(dict):
        __hash__ = object.__hash__

    def generate():
        for index in range(2000):
            record = Record(text=f"{index}", label=index)
            alive.add(record)
            yield record

    for _ in open_documents(generate(), batch_rows=20).batches():
        most = max(most, len(alive))
    assert 0 < most <= 60


def test_a_parquet_row_group_larger_than_the_budget_is_read_in_parts(tmp_path):
    random = np.random.default_rng(0)
    texts = [random.bytes(500).hex() for _ in range(1000)] * 40
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=len(texts), use_dictionary=False)
    texts = len(texts)
    documents, before, most, count = open_documents(tmp_path / "a.parquet"), pa.total_allocated_bytes(), 0, 0
    for batch in documents.batches():
        most, count = max(most, pa.total_allocated_bytes() - before), count + batch.num_rows
    assert count == texts
    assert most < 10e6 < 40e6 < (tmp_path / "a.parquet").stat().st_size * 100


def test_large_jsonl_is_read_in_bounded_memory(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as file:
        for index in range(30_000):
            file.write(json.dumps({"text": f"{index} " * 200}) + "\n")
    code = f"""
import resource, sys
from flexcache.documents import open_documents
list(open_documents([{{"text": "x"}}]).batches())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(batch.num_rows for batch in open_documents({str(tmp_path / "a.jsonl.gz")!r}).batches())
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, grown, torch = run.stdout.split()
    assert (count, torch) == ("30000", "False")
    assert float(grown) < 60  # MiB, of 170 MiB of text


def test_a_description_is_json_and_differs_for_another_corpus(tmp_path):
    def describe(records, name="a.jsonl"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return open_documents(write(records, folder / name)).describe()

    first = describe(RECORDS)
    assert json.loads(json.dumps(first)) == first
    assert first == describe(RECORDS)
    assert str(tmp_path) not in json.dumps(first)
    assert first["kind"] == "jsonl"
    assert first["count"] == 3
    assert first["columns"] == {"id": "string", "text": "string", "stars": "int64", "kind": "string"}
    assert first != describe(RECORDS[:2])
    assert first != describe(RECORDS, "b.jsonl")
    assert first != describe(RECORDS, "a.csv")


@pytest.mark.parametrize("apart", [1, 5, 30])
@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_an_id_that_occurs_twice_is_named_with_both_indices(batch_rows, apart):
    records = [{"id": f"n{index}", "text": "x"} for index in range(40)]
    records[7 + apart]["id"] = "n7"
    message = error_of(records, batch_rows=batch_rows)
    assert "'n7'" in message
    assert f"documents 7 and {7 + apart}" in message
    assert len(rows(records, batch_rows=batch_rows, unique_ids=False)) == 40


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60)), st.integers(1, 9))
def test_ids_are_refused_exactly_where_a_set_would_refuse_them(names, batch_rows):
    records = [{"id": str(name), "text": "x"} for name in names]
    if len(set(names)) == len(names):
        assert rows(records, batch_rows=batch_rows) == records
    else:
        assert "two documents have the id" in error_of(records, batch_rows=batch_rows)


def test_an_empty_corpus_has_no_batches(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    for source in ([], iter([]), tmp_path / "a.jsonl", pa.table({"text": pa.array([], pa.string())})):
        assert rows(source) == []


def test_empty_texts_and_empty_token_lists_are_left_to_the_tokenizer(tmp_path):
    assert rows([{"text": ""}])[0]["text"] == ""
    assert rows([{"tokens": []}])[0]["tokens"] == []


@pytest.mark.parametrize(
    ("source", "options", "parts"),
    [
        ([{"body": "x"}], {}, ["no text and no tokens", "body"]),
        ([{"texts": "x"}], {}, ["did you mean texts?"]),
        ([{"messages": []}], {}, ["messages that cannot be read", "role"]),
        ([{"text": "x", "tokens": [1]}], {}, ["both text and tokens", "document 0"]),
        ([{"text": "x"}, {"tokens": [1]}], {}, ["mixed", "document 1"]),
        ([{"text": "x"}, {"text": None}], {}, ["null", "document 1"]),
        ([{"text": "x"}, {}], {}, ["no text and no tokens", "document 1"]),
        ([{"text": "x"}, "y"], {}, ["not a dict", "document 1", "str"]),
        ([{"text": 5}], {}, ["not a string", "int"]),
        ([{"text": "\ud800"}], {}, ["broken Unicode", "document 0", "single surrogates"]),
        (
            [{"conversations": [{"from": "human", "value": "x"}]}],
            {},
            ["no text and no tokens", "'conversations'", "role"],
        ),
        ([{"id": "\ud800", "text": "x"}], {}, ["broken Unicode", "'id'"]),
        ([{"id": 1.0, "text": "x"}], {}, ["neither text nor a whole number", "float"]),
        ([{"id": True, "text": "x"}], {}, ["neither text nor a whole number", "bool"]),
        ([{"id": "a", "text": "x"}, {"text": "x"}], {}, ["some have none", "document 1"]),
        ([{"text": "x"}, {"id": "a", "text": "x"}], {}, ["some have none", "document 1"]),
        ([{"text": "x"}], {"id": "key"}, ["some have none", "document 0"]),
        ([{"tokens": [1]}, {"tokens": [2, -3]}], {}, ["an invalid token id", "document 1", "-3"]),
        ([{"tokens": [2**31]}], {}, ["an invalid token id", "2147483648"]),
        ([{"tokens": [1.5]}], {}, ["whole numbers", "double"]),
        ([{"tokens": [True]}], {}, ["whole numbers", "bool"]),
        ([{"tokens": [1, None]}], {}, ["an invalid token id", "None"]),
        ([{"tokens": [None]}], {}, ["an invalid token id", "None"]),
        ([{"tokens": "abc"}], {}, ["whole numbers", "string"]),
        ([{"text": "x", "a": 1}, {"text": "x", "a": "y"}], {}, ["'a'", "document 1"]),
        ([{"text": "x", "a": object()}], {}, ["'a'", "document 0", "object"]),
        (
            [{"text": "x", "label": 1}],
            {"labels": ["lable"]},
            ["no label column 'lable'", "did you mean label?"],
        ),
        ([{"text": "x", "label": 1}], {"labels": ["label", "label"]}, ["named twice"]),
        ([{"text": "x", 5: 1}], {}, ["a column name that is not text"]),
        ({"text": ["x"]}, {}, ["not a corpus", "pyarrow.table"]),
        (5, {}, ["not a corpus", "int"]),
        ([{"text": "x"}], {"format": "jsonlines"}, ["no format 'jsonlines'"]),
        ([{"text": "x"}], {"batch_rows": 0}, ["batch_rows"]),
        (pa.table({"text": ["x", None]}), {}, ["null", "document 1"]),
        (pa.table({"text": [1]}), {}, ["does not hold text", "int64"]),
        (pa.table({"text": ["x"], "id": [None]}), {}, ["null", "id"]),
        (pa.table({"text": ["x"], "id": [0.5]}), {}, ["neither text nor", "double"]),
        (pa.table({"text": ["x"]}), {"id": "txt"}, ["no id column 'txt'", "did you mean text?"]),
        (pa.table({"tokens": [[1], None]}), {}, ["null", "document 1"]),
        (pa.table({"body": ["x"], "tokens": [[1]]}), {"text": "body"}, ["both text and tokens"]),
        (pa.table([["x"], ["y"]], ["text", "text"]), {}, ["same name"]),
    ],
)
def test_documents_that_cannot_be_used_are_refused_with_their_place(source, options, parts):
    message = error_of(source, **options)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", sorted(set(RESERVED) - {"id", "text", "tokens"}))
def test_a_label_with_a_reserved_name_is_refused_and_can_be_left_out(name):
    source = [{"text": "x", name: 1, "good": 2}]
    assert "labels=['good']" in error_of(source)
    assert rows(source, labels=["good"]) == [{"id": "0", "text": "x", "good": 2}]


@pytest.mark.parametrize("name", ["id", "text", "tokens"])
def test_a_second_column_with_the_name_of_a_role_is_refused_as_a_label(name):
    source = pa.table({"key": ["a"], "body": ["x"], name: ["y"]})
    assert f"cannot be called '{name}'" in error_of(source, id="key", text="body", tokens=None)


def _broken(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', ["not JSON", "a.jsonl, line 3"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', ["not UTF-8", "a.jsonl, line 2", "0xe4"]),
        ("a.jsonl", b'[{"text": "x"}]\n', ["not a dict", "a.jsonl, line 1", "list"]),
        ("a.jsonl", b'[\n{"text": "x"}\n]\n', ["JSON array", "JSON Lines"]),
        ("a.jsonl", b'{"text": "x"}\n"y"\n', ["not a dict", "a.jsonl, line 2", "str"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', ["null", "a.jsonl, line 2"]),
        ("a.jsonl.gz", b"not gzip", ["JSON Lines file that cannot be read", "a.jsonl.gz"]),
        ("a.csv", b"", ["CSV file that cannot be read", "a.csv"]),
        ("a.csv", b"id,text\n1,x\n2\n", ["CSV file that cannot be read", "Expected 2 columns"]),
        ("a.csv", b"text,n\n\xe4,1\n", ["CSV file that cannot be read", "UTF"]),
        ("a.csv", b"text,text\nx,y\n", ["same name"]),
        ("a.csv", b"tokens\n1 2 3\n", ["whole numbers", "string"]),
        ("a.csv", b"body,n\nx,1\n", ["no text and no tokens", "a.csv"]),
        ("a.parquet", b"PAR1 no", ["Parquet file that cannot be read", "a.parquet"]),
        ("a.txt", b"\xff\xfe", ["not UTF-8", "a.txt", "0xff"]),
        ("a.docx", b"", ["unknown format", ".docx", ".jsonl"]),
    ],
)
def test_broken_files_are_refused_with_the_place(tmp_path, name, content, parts):
    message = error_of(_broken(tmp_path, name, content))
    for part in parts:
        assert part in message


def test_a_truncated_parquet_page_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path, use_dictionary=False, compression="gzip")
    content = bytearray(path.read_bytes())
    content[40:120] = bytes(80)
    path.write_bytes(content)
    assert "Parquet file that cannot be read" in error_of(path)


def test_missing_files_are_refused_with_the_nearest_name(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    assert "did you mean corpus.jsonl?" in error_of(tmp_path / "corpsu.jsonl")
    assert "no files of documents" in error_of(str(tmp_path / "*.csv"))
    assert "no files of documents" in error_of(tmp_path, format="csv")
    assert "give dicts" in error_of(["some text", "another"])


def test_a_folder_of_several_formats_needs_the_format(tmp_path):
    write(RECORDS, tmp_path / "a.jsonl")
    write(RECORDS[:1], tmp_path / "a.csv")
    assert "several formats" in error_of(tmp_path)
    assert len(rows(tmp_path, format="csv")) == 1


def test_csv_files_with_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\nx,1\n")
    (tmp_path / "b.csv").write_text("text,m\nx,1\n")
    message = error_of(tmp_path)
    assert "different columns" in message
    assert "b.csv" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_array(tmp_path, indent, encoding):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=False), encoding=encoding)
    documents = open_documents(tmp_path / "a.json")
    assert documents.schema == SCHEMA
    assert table(documents).to_pylist() == RECORDS
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS[:1]).encode()))
    assert rows(tmp_path / "b.json.gz") == RECORDS[:1]


def test_a_json_array_is_read_across_the_blocks_of_its_file(tmp_path):
    records = [{"id": str(n), "text": "é[{" * (n % 40), "n": 10 ** (n % 9)} for n in range(40_000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 2 << 20
    assert rows(path) == records


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'[{"text": "x"}', "element 1"),
        (b'[{"text": "x"},]', "element 1"),
        (b'[{"text": "x"} {"text": "y"}]', "element 1"),
        (b'[{"text": "x"}] more', "after its array"),
        (b"[", "element 0"),
    ],
)
def test_a_json_array_that_is_broken_is_refused_with_the_place(tmp_path, content, where):
    message = error_of(_broken(tmp_path, "a.json", content))
    assert "JSON array" in message
    assert f"a.json, {where}" in message


def test_null_fields_of_csv_can_be_chosen_and_identify_the_corpus(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text,n,code\nNA,NA,1,x\nb,y,NA,NA\nc,z,,\n")
    first, *others = rows(path)
    assert first == {"id": "NA", "text": "NA", "n": 1, "code": "x"}
    assert [(row["n"], row["code"]) for row in others] == [(None, None), (None, None)]
    kept = rows(path, csv_nulls=())
    assert [(row["n"], row["code"]) for row in kept] == [("1", "x"), ("NA", "NA"), ("", "")]
    described = open_documents(path).describe()
    # as versions before described it, so that their stores resume
    assert described["columns"] == {"id": "string", "text": "string", "n": "string", "code": "string"}
    assert described != open_documents(path, csv_nulls=()).describe()


def test_a_label_that_is_null_at_first_gets_its_type_where_it_has_a_value():
    records = [{"text": "a", "x": None, "y": {"k": None}}] * 5 + [{"text": "b", "x": "q", "y": {"k": 3}}]
    documents = open_documents(iter(records), batch_rows=2)
    batches = list(documents.batches())
    assert [batch["x"].to_pylist() for batch in batches] == [[None, None], [None, None], [None, "q"]]
    assert batches[-1]["y"].to_pylist()[-1] == {"k": 3}
    late = open_documents(iter([*records, {"text": "c", "x": 5, "y": None}]), batch_rows=2)
    with pytest.raises(DocumentsError, match=r"'x' has values that do not fit(.|\n)*documents 6 to 6(.|\n)*string"):
        list(late.batches())
    with pytest.raises(DocumentsError, match="'x' holds a value that does not fit"):
        rows(iter([{"text": "a", "x": "q"}, {"text": "b", "x": 5}]), batch_rows=1)


def test_whole_numbers_up_to_64_bits_are_labels(tmp_path):
    values = [1, 2, 2**64 - 1]
    for batch_rows in (1, 3):
        assert [row["n"] for row in rows([{"text": "x", "n": n} for n in values], batch_rows=batch_rows)] == values
    assert "give it as text" in error_of([{"text": "x", "n": 2**64}])


def test_values_of_numpy_and_pandas_keep_their_types():
    pandas = pytest.importorskip("pandas")
    for value, expected in [
        (np.datetime64("2020-01-02", "D"), "date32[day]"),
        (np.datetime64("2020-01-02", "ns"), "timestamp[ns]"),
        (np.timedelta64(5, "ns"), "duration[ns]"),
        (pandas.Timestamp("2020-01-02"), "timestamp[us]"),
        (np.float32(1.5), "double"),
        (np.bool_(True), "bool"),
    ]:
        nulls = [pandas.NA, pandas.NaT, np.datetime64("NaT", "ns"), None]
        documents = open_documents([{"text": "x", "n": each} for each in (value, *nulls)])
        assert str(documents.schema.field("n").type) == expected
        assert [row["n"] is None for row in table(documents).to_pylist()] == [False, True, True, True, True]


def test_names_with_dots_or_spaces_or_without_letters_are_labels(tmp_path):
    records = [{"id": "a", "text": "x", "a.b": 1, "a": {"b": 2}, "c d": 3, "": 4, "é/ü": 5}]
    for source in (records, write(records, tmp_path / "a.parquet"), write(records, tmp_path / "a.jsonl")):
        assert rows(source) == records
        assert rows(source, labels=["a.b"]) == [{"id": "a", "text": "x", "a.b": 1}]
