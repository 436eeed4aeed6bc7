"""Labels that are joined to a store after its capture."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

import flexcache
from flexcache.errors import ConfigError, DamagedError, DocumentsError, MismatchError, StoreError
from flexcache.store.format.label_table import LabelColumn, LabelTable
from flexcache.store.format.ledger import FileRecord
from flexcache.store.manage.extension_transaction import ExtensionTransaction
from flexcache.store.storage.atomic_files import json_bytes
from tests.corpora import build_store, lengths, token_documents
from tests.recording.test_recorder import shard_hashes

COUNT = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run.zarr"
    build_store(path, token_documents(lengths(COUNT, longest=9)))
    return path


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run.zarr"))


@pytest.fixture
def store(root: Path) -> flexcache.Store:
    return flexcache.open(root)


def stars(start: int = 0, stop: int = COUNT) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"doc-{i}" for i in range(start, stop)], "stars": [i % 5 for i in range(start, stop)]})


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_joined_labels_are_columns_of_the_documents_in_their_order(store: flexcache.Store, root: Path) -> None:
    joined = store.join(stars().sample(frac=1, random_state=3), on="id")
    expected = stars().set_index("id")["stars"].loc[store.documents["id"].to_pylist()].tolist()
    assert store.documents["stars"].to_pylist() == expected
    assert flexcache.open(root).documents.equals(store.documents)
    assert store.head(3).equals(store.documents.slice(0, 3))
    assert (joined.documents, joined.matched, joined.unknown) == (COUNT, COUNT, 0)
    assert "joined: stars (table labels)" in repr(store)


def test_missing_and_unknown_ids_are_counted(store: flexcache.Store, root: Path) -> None:
    joined = store.join(stars(10, COUNT + 7))
    assert (joined.matched, joined.unknown, joined.columns["stars"].missing) == (COUNT - 10, 7, 10)
    assert "30 of 40 documents by id; 7 lines with an unknown id left out" in str(joined)
    assert store.documents["stars"].null_count == 10
    assert flexcache.open(root).label_tables == {"labels": joined}


def test_nan_counts_as_missing(store: flexcache.Store) -> None:
    joined = store.join({"id": ["doc-0", "doc-1", "doc-2"], "score2": [0.5, float("nan"), None]})
    assert joined.columns["score2"].missing == COUNT - 1


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_files_name_their_table_and_give_the_same_labels(store: flexcache.Store, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"sentiment.{kind}"
    {
        "parquet": lambda: stars().to_parquet(path),
        "csv": lambda: stars().to_csv(path, index=False),
        "jsonl": lambda: stars().to_json(path, orient="records", lines=True),
    }[kind]()
    store.join(path)
    assert list(store.label_tables) == ["sentiment"]
    assert store.documents["stars"].to_pylist() == [int(name[4:]) % 5 for name in store.documents["id"].to_pylist()]


def test_whole_number_ids_match_ids_as_text(tmp_path: Path) -> None:
    documents = [{"id": index, "tokens": [index + 3]} for index in range(6)]
    store = build_store(tmp_path / "run.zarr", documents)
    store.join({"id": [5, 3], "odd": [True, True]})
    labels = dict(zip(store.documents["id"].to_pylist(), store.documents["odd"].to_pylist(), strict=True))
    assert labels == {"0": None, "1": None, "2": None, "3": True, "4": None, "5": True}


def test_another_column_labels_all_documents_with_its_value(store: flexcache.Store) -> None:
    joined = store.join([{"label": "odd", "parity": 1}, {"label": "even", "parity": 0}], on="label", name="parities")
    expected = [int(name == "odd") for name in store.documents["label"].to_pylist()]
    assert store.documents["parity"].to_pylist() == expected
    assert joined.matched == COUNT


def test_a_join_changes_no_other_file_and_not_the_identity(store: flexcache.Store, root: Path) -> None:
    before, reference = contents(root), flexcache.open(root).reference
    hashes = shard_hashes(root)
    store.join(stars())
    after = contents(root)
    added = sorted(set(after) - set(before))
    assert {name: after[name] for name in before} == before
    assert [name.split(".")[0] for name in added] == ["labels/labels", "ledger/labels/labels"]
    assert flexcache.open(root).reference == reference
    assert shard_hashes(root) == hashes
    assert flexcache.verify(root).sound


def test_an_equal_join_does_nothing_and_another_one_needs_replace(store: flexcache.Store, root: Path) -> None:
    first = store.join(stars())
    before = contents(root)
    assert store.join(stars()) == first
    assert contents(root) == before
    with pytest.raises(StoreError, match="another label table 'labels'"):
        store.join(stars(0, 5))
    second = store.join(stars(0, 5), replace=True)
    assert store.documents["stars"].null_count == COUNT - 5
    assert store.label_checksums() == {"stars": second.file.xxh3_128} != {"stars": first.file.xxh3_128}
    assert len(list((root / "labels").iterdir())) == 1


def test_a_removed_table_leaves_the_store_as_it_was(store: flexcache.Store, root: Path) -> None:
    before = contents(root)
    store.join(stars())
    store.remove_labels("labels")
    assert contents(root) == before
    assert "stars" not in store.documents.column_names
    assert store.label_tables == {}
    with pytest.raises(StoreError, match="no label table 'labels'"):
        store.remove_labels("labels")


WRONG_TABLES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two lines for one id": ({"id": ["doc-1", "doc-1"], "x": [1, 2]}, {}, "occur in several lines"),
    "a null id": ({"id": ["doc-1", None], "x": [1, 2]}, {}, "the table of labels, line 1"),
    "a key of another type": ({"id": [0.5], "x": [1]}, {}, "the table of labels, lines from 0"),
    "no known id": ({"id": ["a", "b"], "x": [1, 2]}, {}, "no value of 'id'"),
    "no such key": ({"key": ["doc-1"], "x": [1]}, {}, "no column 'id'"),
    "a key that the store lacks": ({"name": ["doc-1"], "x": [1]}, {"on": "name"}, "no column 'name' to join on"),
    "a key of fractions": ({"score": ["0.5"], "x": [1]}, {"on": "score"}, "cannot be joined on 'score'"),
    "a captured name": ({"id": ["doc-1"], "label": ["x"]}, {}, "has a column 'label' already"),
    "a reserved name": ({"id": ["doc-1"], "position": [1]}, {}, "has a column 'position' already"),
    "no labels": ({"id": ["doc-1"]}, {}, "has no labels"),
    "no such column": ({"id": ["doc-1"], "x": [1]}, {"columns": ["y"]}, "no column 'y'"),
    "no value": ({"id": ["doc-1"], "x": pa.array([None], pa.int64())}, {}, "has no value"),
    "no lines": (pa.table({"id": pa.array([], pa.string()), "x": pa.array([], pa.int64())}), {}, "no value of .id."),
    "a name that leads out": ({"id": ["doc-1"], "x": [1]}, {"name": "../x"}, "cannot have this name"),
    "an unknown token label": ({"id": ["doc-1"], "x": [1]}, {"token_labels": "y"}, "no label of the table"),
    "not a table": (7, {}, "not a table of labels"),
    "mixed types": ([{"id": "doc-1", "x": 1}, {"id": "doc-2", "x": "a"}], {}, "x"),
}


@pytest.mark.parametrize(("table", "options", "message"), WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_table_that_cannot_be_joined_is_refused_and_changes_nothing(
    store: flexcache.Store, root: Path, table: Any, options: dict[str, Any], message: str
) -> None:
    before = contents(root)
    with pytest.raises((DocumentsError, ConfigError), match=message):
        store.join(table, **options)
    assert contents(root) == before


def test_two_tables_cannot_have_one_label(store: flexcache.Store) -> None:
    store.join(stars(), name="one")
    with pytest.raises(DocumentsError, match="has a column 'stars' already"):
        store.join(stars(), name="two")


# Tokens


def token_rows(store: flexcache.Store) -> list[tuple[str, int]]:
    ids = store.documents["id"].to_pylist()
    document, position = (store.coordinates[name].values for name in ("document", "position"))
    return [(ids[d], p) for d, p in zip(document.tolist(), position.tolist(), strict=True)]


OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "windows": {"windows": {"length": 5, "stride": 3}},
    "packed": {"packing": {"length": 16, "separator": 0, "bos": None}},
    "chosen": {"rows": {"every": 2}},
    "last": {"rows": "last"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lists_of_labels_give_each_row_the_label_of_its_token(tmp_path: Path, options: dict[str, Any]) -> None:
    documents = token_documents(lengths(COUNT, longest=9))
    store = build_store(tmp_path / "run.zarr", documents, **options)
    table = [{"id": d["id"], "tag": [f"{d['id']}/{at}" for at in range(len(d["tokens"]))]} for d in documents[5:]]
    store.join(table, token_labels=["tag"])
    assert store.token_labels[-1:] == ("tag",)
    assert "tag" not in store.documents.column_names
    known = {document["id"] for document in documents[5:]}
    assert store.token_label("tag").to_pylist() == [
        f"{name}/{position}" if name in known else None for name, position in token_rows(store)
    ]


def test_joined_labels_of_tokens_equal_captured_ones(tmp_path: Path) -> None:
    documents = token_documents(lengths(COUNT, longest=9))
    spans = [[{"start": 1, "end": 3, "label": "a"}, {"start": 2, "end": 4, "label": "b"}], [], None]
    table = [{"id": d["id"], "entities": spans[index % 3]} for index, d in enumerate(documents)]
    with_spans = [{**document, "entities": line["entities"]} for document, line in zip(documents, table, strict=True)]
    captured = build_store(tmp_path / "captured.zarr", with_spans, token_labels=["entities"])
    joined = build_store(tmp_path / "joined.zarr", documents)
    joined.join(table, token_labels="entities")
    assert joined.token_label("entities").to_pylist() == captured.token_label("entities").to_pylist()


def test_a_list_of_another_length_is_refused(store: flexcache.Store) -> None:
    with pytest.raises(DocumentsError, match="does not have one entry for each token"):
        store.join([{"id": "doc-1", "tag": ["x"] * 50}], token_labels="tag")


def test_means_have_no_labels_of_tokens(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", token_documents([3, 2]), rows="mean")
    with pytest.raises(StoreError, match="rows are means"):
        store.join([{"id": "doc-1", "tag": ["x"]}], token_labels="tag")


# Damage, readers and writers


def test_verify_finds_damage_of_a_table_and_of_its_record(store: flexcache.Store, root: Path) -> None:
    record = store.join(stars())
    file = root / record.path
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (found,) = flexcache.verify(root).findings
    assert (found.file, found.problem, found.unit) == (
        record.path,
        "has other bytes than were written (checksum)",
        None,
    )
    with pytest.raises(DamagedError, match="other bytes than were written"):
        _ = flexcache.open(root).documents
    assert flexcache.open(root).rows(document="doc-1").size  # rows need no labels
    file.unlink()
    assert [finding.problem for finding in flexcache.verify(root).findings] == ["is missing"]
    assert flexcache.repair(root).beyond
    (root / record.record_path).write_text("{}")
    assert "cannot be read" in flexcache.verify(root).findings[0].problem
    store.remove_labels("labels")
    assert flexcache.verify(root).sound


def test_a_file_of_an_interrupted_join_is_stray_and_the_next_join_removes_it(
    store: flexcache.Store, root: Path
) -> None:
    record = store.join(stars())
    (root / record.record_path).unlink()  # as if the process had ended before it wrote the record
    reopened = flexcache.open(root)
    assert "stars" not in reopened.documents.column_names
    assert [finding.stray for finding in flexcache.verify(root).findings] == [True]
    reopened.join(stars(0, 9))
    assert flexcache.verify(root).sound


def test_an_unpickled_store_has_the_labels_of_the_original(store: flexcache.Store) -> None:
    store.join(stars())
    documents = store.documents
    first = pickle.dumps(store)
    store.join(stars(0, 5), replace=True)
    second = pickle.loads(pickle.dumps(store))
    assert second.documents.equals(store.documents)
    with pytest.raises(DamagedError, match="missing"):  # not the labels that took their place
        _ = pickle.loads(first).documents
    assert documents["stars"].null_count == 0


def test_a_table_of_other_documents_is_not_used(store: flexcache.Store, root: Path, tmp_path: Path) -> None:
    other = build_store(tmp_path / "other.zarr", token_documents(lengths(COUNT, longest=9, seed=5)))
    record = other.join(stars())
    for name in (record.path, record.record_path):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes((other.path / name).read_bytes())
    with pytest.raises(DamagedError, match="belongs to other documents"):
        _ = flexcache.open(root).documents


# Other stores


def test_a_copy_has_the_joined_labels(store: flexcache.Store, root: Path, tmp_path: Path) -> None:
    store.join(stars())
    copied = flexcache.copy(root, tmp_path / "copy.zarr", layers=[0])
    assert copied.label_tables == store.label_tables
    assert copied.documents.equals(store.documents)
    assert flexcache.verify(copied.path).sound
    assert flexcache.copy(root, tmp_path / "copy.zarr", layers=[0]).documents.equals(store.documents)
    copied.join(stars(0, 5), replace=True)
    with pytest.raises(MismatchError, match="different labels"):
        flexcache.copy(root, tmp_path / "copy.zarr", layers=[0])


def test_a_merge_has_the_tables_of_all_sources(store: flexcache.Store, root: Path, tmp_path: Path) -> None:
    parts = [flexcache.copy(root, tmp_path / f"{layer}.zarr", layers=[layer]) for layer in (0, 3)]
    parts[0].join(stars(), name="stars")
    parts[1].join({"id": ["doc-1"], "mark": [True]}, name="marks")
    merged = flexcache.merge([part.path for part in parts], tmp_path / "merged.zarr")
    assert list(merged.label_tables) == ["marks", "stars"]
    assert {"stars", "mark"} <= set(merged.documents.column_names)
    assert flexcache.verify(merged.path).sound
    parts[1].join({"id": ["doc-1"], "stars": [1]}, name="stars")
    with pytest.raises(MismatchError, match="different labels"):
        flexcache.merge([part.path for part in parts], tmp_path / "again.zarr")
    assert not (tmp_path / "again.zarr").exists()


def test_a_removal_of_sites_keeps_the_labels(store: flexcache.Store, root: Path) -> None:
    store.join(stars())
    flexcache.Removal(root, ["model.embed"]).run()
    assert flexcache.open(root).documents.equals(store.documents)
    assert flexcache.verify(root).sound


def test_documents_that_are_added_later_have_no_labels_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    documents = token_documents(lengths(COUNT + 8, longest=9))
    store = build_store(path, documents[:COUNT])
    store.join(stars())
    store.join([{"id": "doc-2", "tag": ["x"] * len(documents[2]["tokens"])}], name="tags", token_labels="tag")
    build_store(path, documents[COUNT:], extend=True)
    extended = flexcache.open(path)
    assert len(extended.documents) == COUNT + 8
    labels = dict(zip(extended.documents["id"].to_pylist(), extended.documents["stars"].to_pylist(), strict=True))
    assert labels == {f"doc-{i}": i % 5 if i < COUNT else None for i in range(COUNT + 8)}
    assert extended.token_label("tag").drop_null().to_pylist() == ["x"] * len(documents[2]["tokens"])
    assert "8 documents that were added later have no labels of the table labels" in repr(extended)
    assert flexcache.verify(path).sound
    assert store.documents["stars"].null_count == 0  # of the store that was open before
    extended.join(stars(0, COUNT + 8), replace=True)
    assert extended.documents["stars"].null_count == 0


def test_an_extension_cannot_bring_a_label_that_was_joined(store: flexcache.Store, root: Path) -> None:
    store.join(stars())
    new = [{"id": "new", "tokens": [5, 6], "label": "odd", "score": 0.0, "stars": 3}]
    with pytest.raises(DocumentsError, match="has the name of a label that was joined"):
        build_store(root, new, extend=True)
    assert not ExtensionTransaction(root).staged


def test_the_record_is_json_with_a_checksum_of_its_own(store: flexcache.Store, root: Path) -> None:
    record = store.join(stars())
    path = root / record.record_path
    data = json.loads(path.read_bytes())
    assert data["columns"]["stars"] == {"type": "int64", "of": "documents", "missing": 0}
    path.write_text(path.read_text().replace('"matched": 40', '"matched": 39'))
    with pytest.raises(DamagedError, match="label table labels cannot be read"):
        _ = flexcache.open(root).label_tables


@pytest.mark.parametrize("change", [{"stars": pa.array([1])}, {"id": pa.array(["doc-0"])}, {}])
def test_a_record_that_promises_other_columns_is_damage(root: Path, change: dict[str, pa.Array]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": pa.array(["doc-0"]), "note": pa.array([1]), **change}), sink)
    content = sink.getvalue()
    file = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    of = {} if change else {"note": LabelColumn("list<item: int64>", "tokens", 0)}
    record = LabelTable("x", "id", 1, 1, 0, of or {"stars": LabelColumn("int64", "documents", 0)}, file)
    for name, written in ((record.path, content), (record.record_path, json_bytes(record.to_json()))):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(written)
    store = flexcache.open(root)
    if change.keys() == {"stars"}:
        assert "stars" in store.head(0).column_names
        return
    with pytest.raises(DamagedError, match="a label table cannot be read"):
        _ = store.token_label("note") if of else store.documents


def test_an_export_holds_the_joined_labels(store: flexcache.Store, root: Path, tmp_path: Path) -> None:
    from flexcache.exchange.exporting import export

    store.join(stars())
    export(root, tmp_path / "out", "parquet")
    assert pq.read_table(tmp_path / "out" / "documents.parquet")["stars"].equals(store.documents["stars"])
    lines = pq.read_table(tmp_path / "out" / "data")
    document = np.asarray(store.coordinates["document"].values)
    assert lines["stars"].to_pylist() == store.documents["stars"].take(pa.array(document)).to_pylist()
