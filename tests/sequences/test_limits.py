"""Limits of documents, each exactly reached and exceeded by one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from flexcache.documents import open_documents
from flexcache.errors import DocumentsError
from flexcache.options import SequenceOptions
from flexcache.sequences import tokenize_corpus
from flexcache.sequences.encoding import encode_documents
from flexcache.sequences.limits import check_document_lengths, check_token_ids


def encoded(tokens: list[int], **options: Any) -> Any:
    batch = pa.RecordBatch.from_pydict({"id": ["a"], "tokens": pa.array([tokens], pa.list_(pa.int32()))})
    return encode_documents(batch, None, SequenceOptions(**options))


def test_a_document_may_have_as_many_tokens_as_the_model_has_positions() -> None:
    check_document_lengths(encoded([1] * 5), SequenceOptions(), 5)
    check_document_lengths(encoded([1] * 50), SequenceOptions(), None)
    with pytest.raises(DocumentsError, match=r"'a' is longer than the model can read[\s\S]*found: 6 tokens"):
        check_document_lengths(encoded([1] * 6), SequenceOptions(), 5)
    windows = SequenceOptions.model_validate({"windows": {"length": 5}})
    check_document_lengths(encoded([1] * 50, windows={"length": 5}), windows, 5)


def test_token_ids_are_below_the_vocabulary() -> None:
    check_token_ids(encoded([0, 6]), 7)
    check_token_ids(encoded([2**31 - 2]), None)
    for ids, vocabulary in (([0, 7], 7), ([-1], 7), ([2**31 - 1], None)):
        with pytest.raises(DocumentsError, match="a token id that the model does not know"):
            check_token_ids(encoded(ids), vocabulary)


@pytest.mark.parametrize(
    ("most", "documents"), [(1, 1), (3, 1), (4, 2), (5, 2), (6, 3), (9, 3), (10, 3)], ids=lambda n: str(n)
)
def test_the_document_that_reaches_the_number_of_tokens_is_the_last(most: int, documents: int, tmp_path: Any) -> None:
    corpus = open_documents(
        [{"id": str(n), "tokens": [1] * length} for n, length in enumerate([3, 2, 4])], batch_rows=2
    )
    options = SequenceOptions(max_tokens=most)
    assert len([*tokenize_corpus(corpus, None, tmp_path, options)][-1].lengths) == documents
