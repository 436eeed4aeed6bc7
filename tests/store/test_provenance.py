"""Typed spec and provenance of a store, and attributes that other versions wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flexcache
from flexcache.errors import ConfigError, DamagedError
from flexcache.spec import CaptureSpec
from flexcache.store.format.provenance import Provenance
from flexcache.store.manage.copy import copy
from tests.corpora import build_store, token_documents
from tests.models import tiny

DOCUMENTS = token_documents([3, 5, 4, 6])


def rewritten(store: flexcache.Store, change: Callable[[dict[str, Any]], Any]) -> flexcache.Store:
    """Return the store after a change of its attributes."""
    path = Path(str(store.path)) / "zarr.json"
    content = json.loads(path.read_bytes())
    change(content["attributes"]["flexcache"])
    path.write_text(json.dumps(content))
    return flexcache.open(path.parent)


def attributes(store: flexcache.Store) -> Any:
    return json.loads((store.path / "zarr.json").read_bytes())["attributes"]["flexcache"]


def test_spec_and_provenance_hold_what_the_attributes_hold(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    assert isinstance(store.spec, CaptureSpec)
    assert isinstance(store.provenance, Provenance)
    assert store.spec.to_json() == attributes(store)["spec"]
    assert store.provenance.to_json() == attributes(store)["provenance"]


def test_fields_that_an_earlier_version_did_not_write_have_their_defaults(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["spec"] = {"sites": {"resid_post": "all"}, "rows": "all"}
        content["provenance"] = {"model": {"class": "Linear"}}

    store = rewritten(build_store(tmp_path / "run.zarr", DOCUMENTS), change)
    assert (store.spec.compression, store.spec.batch_tokens, store.spec.decoder) == ("none", 4096, None)
    assert (store.provenance.model_name, store.provenance.tokenizer, store.provenance.created) == ("", None, "")
    assert store.provenance.history == ()
    assert repr(store)


def test_a_field_of_a_later_version_is_read_over_and_copied_and_not_extended(tmp_path: Path) -> None:
    made = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "run.zarr", progress=False)
    store = rewritten(made, lambda content: content["spec"].update(of_later="x"))
    assert store.read("resid_post", 0).shape[0] == store.n_rows
    assert attributes(copy(store.path, tmp_path / "copy.zarr"))["spec"]["of_later"] == "x"
    with pytest.raises(ConfigError, match="unknown key 'of_later'"):
        flexcache.extend(tiny("llama"), None, [{"id": "new", "tokens": [1, 2]}], store.path, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["spec"].update(compression="lzma"),
        lambda content: content["spec"].update(rows=["all"]),
        lambda content: content["spec"].update(batch_tokens="many"),
        lambda content: content["provenance"].update(model=["a list"]),
        lambda content: content["provenance"].update(batching={"batches": "never"}),
    ],
)
def test_attributes_of_another_type_are_damage(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(DamagedError, match="metadata is not valid"):
        rewritten(store, change)
