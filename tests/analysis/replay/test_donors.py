from __future__ import annotations

import datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from analysis import replay
from flexcache.errors import AnalysisError

NAN = float("nan")
LABELS = {
    "numbers": pa.array([1.0, 1.0, NAN, NAN, None, 2.0, 0.0, -0.0]),
    "texts": pa.array(["a", "a", None, "", " ", "b", "c", "c"]),
    "codes": pa.array([1, 1, None, None, None, 2, 0, 0]),
    "booleans": pa.array([True, True, None, None, None, False, None, None]),
    "dates": pa.array(pd.to_datetime(["2020-01-01"] * 2 + [None] * 3 + ["2021-01-01"] * 3)),
    "days": pa.array([datetime.date(2020, 1, 1)] * 2 + [None] * 3 + [datetime.date(2021, 1, 1)] * 3),
    "decimals": pa.array([Decimal("1.0")] * 2 + [None] * 3 + [Decimal("2.0")] * 3),
    "words": pa.array(["a", "a", None, None, None, "b", "c", "c"]).dictionary_encode(),
    "null words": pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, 1, None, 2, 2, 2]), pa.array(["a", None, "b"])),
}


def documents(labels: pa.Array) -> Any:
    lengths = pa.array([5] * 8, pa.int32())
    return SimpleNamespace(documents=pa.table({"id": list("abcdefgh"), "n_tokens": lengths, "label": labels}))


@pytest.mark.parametrize("kind", list(LABELS))
def test_a_document_without_a_label_has_no_donor_and_is_no_donor(kind: str) -> None:
    labels = [None if value in ("", " ") or value != value else value for value in LABELS[kind].to_pylist()]
    known = dict(zip("abcdefgh", labels))
    expected = {name for name, label in known.items() if label is not None}
    seen: set[tuple[str, str]] = set()
    for seed in range(20):
        found = replay.same_length(documents(LABELS[kind]), seed=seed, differing="label")
        assert set(found) == expected
        seen |= set(found.items())
    assert seen == {(a, b) for a in expected for b in expected if known[a] != known[b]}


def test_without_a_label_every_other_document_of_the_length_may_be_a_donor() -> None:
    pairs = {pair for seed in range(60) for pair in replay.same_length(documents(LABELS["codes"]), seed=seed).items()}
    assert pairs == {(a, b) for a in "abcdefgh" for b in "abcdefgh" if a != b}


def test_a_column_that_is_not_a_label_raises_an_error() -> None:
    with pytest.raises(AnalysisError, match="no column 'lable'"):
        replay.same_length(documents(LABELS["codes"]), differing="lable")
    column: Any = 3
    with pytest.raises(AnalysisError, match="no column 3"):
        replay.same_length(documents(LABELS["codes"]), differing=column)
    for column in (pa.array([["a"]] * 8), pa.array([None] * 8)):
        with pytest.raises(AnalysisError, match="cannot be a label"):
            replay.same_length(documents(column), differing="label")


@pytest.mark.parametrize("seed", ["label", 1.5, -1, None])
def test_a_seed_that_is_not_a_whole_number_raises_an_error(seed: Any) -> None:
    with pytest.raises(AnalysisError, match="seed cannot be used") as caught:
        replay.same_length(documents(LABELS["codes"]), seed)
    assert (caught.value.remedy or "").endswith("differing='label'") == (seed == "label")
