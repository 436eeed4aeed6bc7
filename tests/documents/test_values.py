"""Python values of labels: kept exactly, or refused."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from flexcache.documents import open_documents
from flexcache.errors import DocumentsError

pd = pytest.importorskip("pandas")

DAY = datetime.date(2020, 1, 2)
NAIVE = datetime.datetime(2020, 1, 2, 3, 4, 5)
AWARE = NAIVE.replace(tzinfo=datetime.UTC)
TIME = datetime.time(1, 2)
SPAN = datetime.timedelta(seconds=3)
EXACT = "2020-01-02 00:00:00.000000001"
MIXED = [
    *((DAY, NAIVE), (NAIVE, AWARE), (SPAN, 5), (NAIVE, 5), (DAY, 5), (TIME, 5), ("a", b"b"), (bytearray(b"a"), "b")),
    (1, True),
]
KEPT = [
    *((DAY, None, DAY), (NAIVE, NAIVE), (AWARE, None), (SPAN, SPAN), (TIME,), ("a", "b"), (b"a", None), (1, 2.5)),
    *((Decimal("1.5"), Decimal("2.5")), (NAIVE, pd.Timestamp(EXACT)), (pd.Timestamp(EXACT, tz="UTC"),)),
    *((pd.Timedelta(1), None), (pd.Timestamp(EXACT, tz="UTC"), AWARE)),
]


def documents(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


def read(source: Any, **options: Any) -> list[Any]:
    return [row["label"] for batch in open_documents(source, **options).batches() for row in batch.to_pylist()]


WRAPPED = [lambda value: value, lambda value: [value], lambda value: {"at": value}, lambda value: [{"at": [value]}]]


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("pair", MIXED, ids=str)
def test_labels_of_different_types_are_refused_in_either_order(pair: tuple[Any, Any], rows: int, wrap: Any) -> None:
    for labels in (list(map(wrap, pair)), list(map(wrap, pair[::-1]))):
        for source in (documents(labels), iter(documents(labels)), iter(documents([None, *labels]))):
            with pytest.raises(DocumentsError, match="'label'"):
                read(source, batch_rows=rows)


@pytest.mark.parametrize("pair", MIXED, ids=str)
def test_values_of_different_types_in_one_list_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(DocumentsError, match="values of different types"):
        read(documents([list(pair)]))


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("values", KEPT, ids=str)
def test_labels_of_one_type_are_kept_exactly(values: tuple[Any, ...], wrap: Any) -> None:
    labels = list(map(wrap, values))
    assert read(documents(labels)) == labels
    assert read(documents(labels), batch_rows=1) == labels


def test_a_generator_refuses_a_nanosecond_after_its_first_documents() -> None:
    with pytest.raises(DocumentsError, match="'label'"):
        read(iter(documents([NAIVE, pd.Timestamp(EXACT)])), batch_rows=1)


def test_a_missing_time_of_pandas_is_null() -> None:
    assert read(documents([pd.NaT, pd.Timestamp(AWARE)])) == [None, AWARE]


def test_a_number_after_a_duration_of_numpy_is_refused() -> None:
    for labels in ([np.timedelta64(1, "ns"), 5], [5, np.timedelta64(1, "ns")]):
        with pytest.raises(DocumentsError, match="'label'"):
            read(documents(labels))
