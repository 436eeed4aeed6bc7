"""Errors for common mistakes in documents: each names the mistake."""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import flexcache
from flexcache.documents import open_documents
from flexcache.errors import DocumentsError
from tests.models import tiny

pd = pytest.importorskip("pandas")


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(DocumentsError) as caught:
        for _ in open_documents(source, **options).batches():
            pass
    return str(caught.value)


def test_a_table_without_rows_holds_no_documents(tmp_path: Path) -> None:
    model = tiny("llama")
    frames = [pd.DataFrame(), pd.DataFrame({"text": []}), pd.DataFrame({"id": [], "tokens": []})]
    for source in (*frames, pa.table({"text": []}), pa.table({"id": pa.array([], pa.float64()), "text": []})):
        documents = open_documents(source)
        assert (documents.count, list(documents.batches())) == (0, [])
        with pytest.raises(DocumentsError, match="there are no documents"):
            flexcache.capture(model, None, source, tmp_path / "run.zarr", progress=False)
    assert "every text is missing" in error_of(pd.DataFrame({"text": [float("nan")] * 2}))


@pytest.mark.parametrize("name", [None, "text"])
def test_a_series_is_refused_and_the_remedy_works(name: str | None) -> None:
    documents = pd.Series(["a", "b"], name=name)
    assert "documents.to_frame('text')" in error_of(documents)
    (batch,) = open_documents(documents.to_frame("text")).batches()
    assert batch["text"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin1"])
@pytest.mark.parametrize("header", ["text,n", "text,größe"])
def test_the_error_for_a_csv_file_names_its_encoding(encoding: str, header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = f"{header}\n" + "x,1\n" * 40_000 + "ä,1\n"
    path.write_bytes(text.encode(encoding))
    name = "latin1" if encoding == "latin1" else "UTF-16"
    message = error_of(path)
    assert f"its encoding is not UTF-8 but perhaps {name}" in message
    assert f"iconv -f {name} -t utf-8" in message
    path.write_bytes(text.encode("utf-8-sig"))
    assert open_documents(path).count == 40_001


@pytest.mark.parametrize("sign", [";", "\t", "|"])
@pytest.mark.parametrize("line", ["x{0}y", "a, b{0}y"])
@pytest.mark.parametrize("header", ["text{0}n", '"id"{0}"text"', "body{0}n"])
def test_the_error_for_a_csv_file_names_its_delimiter(sign: str, line: str, header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n{line}\n".format(sign))
    message = error_of(path)
    assert "delimiter is not a comma" in message
    assert f"sep={sign!r}" in message
    path.write_text(f"text,a{sign}b\nx,y{sign}z\n")
    assert open_documents(path).labels == (f"a{sign}b",)


@pytest.mark.parametrize(
    "values", [[1, True], [date(2020, 1, 2), datetime(2020, 1, 2, 3)], ["a", b"b"], [1, "a"]], ids=str
)
def test_values_of_different_types_are_refused_as_such(values: list[Any]) -> None:
    for source in (pd.DataFrame({"text": ["a", "b"], "n": values}), [{"text": "a", "n": values}]):
        assert "values of different types" in error_of(source)
    assert "changes its type" in error_of([{"text": "a", "n": value} for value in values])


def test_remedies_name_arguments_of_open_documents(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "a.csv").write_text("text\nx\n")
    for source, argument in (
        ([{"id": "a", "text": "x"}] * 2, "unique_ids=False"),
        ([{"body": "x"}], "text='body'"),
        (pa.table({"text": [1]}), "text='body'"),
        (pa.table({"text": ["a", None]}), "text=None"),
        (pa.table({"text": ["a"], "tokens": [[1]]}), "text=None"),
        (tmp_path / "a.docx", "format='jsonl'"),
        (tmp_path, "format='csv'"),
    ):
        assert re.search(rf"flexcache\.open_documents\(…, {re.escape(argument)}", error_of(source)), argument
