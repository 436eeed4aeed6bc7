"""Labels that are joined to a store on object storage."""

from __future__ import annotations

from pathlib import Path

import pytest

import flexcache
from flexcache.errors import DamagedError, StoreError
from flexcache.store.manage.copy import copy
from flexcache.store.storage.object_path import ObjectPath
from tests.corpora import build_store, lengths, token_documents

DOCUMENTS = token_documents(lengths(20, longest=5))
LABELS = {"id": [f"doc-{i}" for i in range(18)], "stars": list(range(18))}


def test_labels_are_joined_replaced_carried_and_removed(everywhere: str, tmp_path: Path) -> None:
    here = build_store(tmp_path / "run.zarr", DOCUMENTS)
    here.join(LABELS)
    there = copy(here.path, f"{everywhere}/run.zarr")
    assert isinstance(there.path, ObjectPath)
    assert there.label_tables == here.label_tables
    assert there.documents.equals(here.documents)
    tags = [{"id": "doc-3", "tag": ["x"] * len(DOCUMENTS[3]["tokens"])}]
    there.join(tags, name="tags", token_labels="tag")
    assert there.token_label("tag").drop_null().to_pylist() == ["x"] * len(DOCUMENTS[3]["tokens"])
    with pytest.raises(StoreError, match="another label table"):
        there.join({"id": ["doc-0"], "stars": [7]})
    there.join({"id": ["doc-0"], "stars": [7]}, replace=True)
    assert flexcache.open(there.path).documents["stars"].drop_null().to_pylist() == [7]
    assert flexcache.verify(there.path).sound
    assert len([name for name in there.path.sizes() if name.startswith("labels/")]) == 2
    back = copy(there.path, tmp_path / "back.zarr")
    assert list(back.label_tables) == ["labels", "tags"]
    table = there.label_tables["labels"]
    (there.path / table.path).write_bytes(b"damaged")
    assert [finding.file for finding in flexcache.verify(there.path).findings] == [table.path]
    with pytest.raises(DamagedError, match="other bytes"):
        _ = flexcache.open(there.path).documents
    there.remove_labels("labels")
    there.remove_labels("tags")
    assert flexcache.verify(there.path).sound
    assert not [name for name in there.path.sizes() if name.startswith((".", "labels/", "ledger/labels/"))]
