"""One contract for every source of documents: all documents, in their order, in whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

import flexcache.documents  # noqa: F401 - imports every source
from flexcache.documents import open_documents
from flexcache.documents.sources.files import FORMATS
from flexcache.documents.sources.source import DocumentSource

RECORDS = [{"id": f"{n}.txt", "text": f"text {n}"} for n in range(7)]
TABLE = pa.Table.from_pylist(RECORDS)


def parquet(folder: Path) -> Path:
    for number, part in enumerate((TABLE[:3], TABLE[3:])):
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=2)
    return folder


def jsonl(folder: Path) -> Path:
    for number, part in enumerate((RECORDS[:3], RECORDS[3:])):
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


def csv(folder: Path) -> Path:
    for number, part in enumerate((TABLE[:3], TABLE[3:])):
        pcsv.write_csv(part, folder / f"{number}.csv")
    return folder


def txt(folder: Path) -> Path:
    for record in RECORDS:
        (folder / record["id"]).write_text(record["text"], encoding="utf-8")
    return folder


def dataset(folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(RECORDS)


EXAMPLES: dict[str, Callable[[Path], Any]] = {
    "parquet": parquet,
    "jsonl": jsonl,
    "csv": csv,
    "txt": txt,
    "dataset": dataset,
    "table": lambda folder: TABLE,
    "iterable": lambda folder: RECORDS,
}
"""`RECORDS` by the kind of the source that reads them; add new sources here to test them against the contract."""


def test_every_kind_of_source_is_held_to_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    kinds = set()
    for name, make in EXAMPLES.items():
        (tmp_path / name).mkdir()
        kinds.add(type(open_documents(make(tmp_path / name))._source))
    sources = {kind for kind in DocumentSource.__subclasses__() if kind.__module__.startswith("flexcache.")}
    assert kinds == sources
    assert FORMATS.keys() - {"image"} <= EXAMPLES.keys()  # images have no text


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_a_source_gives_all_documents_in_order_and_any_of_them(name: str, batch_rows: int, tmp_path: Path) -> None:
    documents = open_documents(EXAMPLES[name](tmp_path), batch_rows=batch_rows)
    for _ in range(2):
        batches = list(documents.batches())
        assert [record for batch in batches for record in batch.to_pylist()] == RECORDS
        assert max(batch.num_rows for batch in batches) <= batch_rows
    assert documents.count == len(RECORDS)
    for runs in ([range(7)], [range(1)], [range(1, 3), range(4, 7)], [range(6, 7)]):
        found = [record for batch in documents.select_runs(runs).batches() for record in batch.to_pylist()]
        assert found == [RECORDS[n] for run in runs for n in run]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_source_describes_its_kind_and_columns_as_json(name: str, tmp_path: Path) -> None:
    description = open_documents(EXAMPLES[name](tmp_path)).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["kind"] == name
    assert description["columns"] == {"id": "string", "text": "string"}
