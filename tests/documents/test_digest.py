"""Digests of corpora: equal for equal documents of any source, different for any other value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexcache.documents import digest as module
from flexcache.documents import open_documents
from flexcache.documents.digest import digest_files
from flexcache.documents.sources.source import CorpusFile

VALUES = st.fixed_dictionaries(
    {
        "text": st.text(min_size=1, max_size=5),
        "label": st.none() | st.text(max_size=3),
        "score": st.none() | st.floats(allow_nan=False),
        "tags": st.none() | st.lists(st.none() | st.integers(0, 3), max_size=3),
        "about": st.none() | st.fixed_dictionaries({"a": st.none() | st.booleans()}),
    }
)
FIXED: dict[str, Any] = {"text": "x", "label": "y", "score": 1.5, "tags": [1], "about": {"a": True}}


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(VALUES, max_size=8), others=st.lists(VALUES, max_size=8), size=st.integers(1, 5))
def test_equal_documents_have_equal_digests_and_others_do_not(rows: list, others: list, size: int) -> None:
    """However they are cut into batches, from which place of a table they come, and as dicts or as a table."""
    rows, others = [FIXED, *rows], [FIXED, *others]
    one = open_documents(rows).digest()
    assert open_documents(rows, batch_rows=size).digest() is not None
    again = open_documents(json.loads(json.dumps(rows))).digest()
    assert one == again
    assert (one == open_documents(others).digest()) == (rows == others)
    table = pa.Table.from_pylist([FIXED, FIXED, *rows]).slice(2)
    whole = pa.Table.from_pylist(rows, schema=table.schema)
    assert open_documents(table).digest() == open_documents(whole).digest()


def test_a_generator_has_a_digest_once_it_was_read_and_is_read_for_it_only_on_request() -> None:
    rows = [{"text": str(number)} for number in range(3000)]
    documents = open_documents(iter(rows))
    assert documents.digest() is None
    list(documents.batches())
    assert documents.digest() == open_documents(rows).digest()
    assert open_documents(iter(rows)).digest(read=True) == open_documents(rows).digest()
    begun = open_documents(iter(rows))
    next(begun.batches())
    assert begun.digest(read=True) is None


def test_the_digest_of_files_depends_on_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n')
    before = open_documents(path).describe()
    path.write_text('{"text": "abd"}\n')
    after = open_documents(path).describe()
    assert {key for key in before if before[key] != after[key]} == {"xxh3_128"}


@pytest.mark.parametrize("size", [1, 1000, 65_536, 65_537, 1_000_000])
def test_large_files_are_sampled_at_even_distances(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", 256 << 10)
    path = tmp_path / "a.bin"
    content = bytearray(size)

    def digest() -> str:
        path.write_bytes(content)
        return digest_files([CorpusFile(path, "a.bin")])

    seen = {digest()}
    for at in (0, size - 1):  # the first and the last block are always read
        content[at] ^= 1
        seen.add(digest())
    assert len(seen) == 3 if size > 1 else len(seen) == 2
