"""Extend an existing store by documents, layers and sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from flexcache.errors import ConfigError, MismatchError
from flexcache.recording.forward.objective import LogitDifference
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

OLD = token_documents(lengths(60, longest=30), vocabulary=VOCABULARY)
NEW = [{**d, "id": f"new-{d['id']}"} for d in token_documents(lengths(50, longest=30, seed=4), 8, VOCABULARY)]
QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny("llama")


def capture(model: torch.nn.Module, path: Path, **options: Any) -> flexcache.Store:
    return flexcache.capture(model, None, OLD, path, batch_tokens=128, **QUIET, **options)


def check_recomputed(model: torch.nn.Module, path: Path, **functions: Any) -> None:
    """Check that every unit equals a new run of the model on the stored plan, byte for byte."""
    found = flexcache.recompute(model, path, units=1000, **functions)
    assert {item.unit for item in found} == set(range(flexcache.open(path).n_units))
    assert all(item.equal and item.same_conditions for item in found)


def test_documents_layers_and_sites_are_added_one_after_another(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    before = capture(model, path, layers=[1])
    held = before.read("resid_post", 1)
    flexcache.extend(model, None, path, NEW, **QUIET)
    flexcache.extend(model, None, path, layers=[0, 3], **QUIET)
    store = flexcache.extend(model, None, path, sites=["mlp_out", "model.norm"], layers="1:3", **QUIET)
    assert np.array_equal(store.read("resid_post", 1, slice(before.n_rows)), held)
    assert store.layers("resid_post") == (0, 1, 3)
    assert store.layers("mlp_out") == (1, 2)
    assert store.documents.num_rows == 110
    assert flexcache.verify(path).sound
    check_recomputed(model, path)
    asked = [next(iter(entry["extended_by"])) for entry in store.provenance.history]
    assert asked == ["documents", "arrays", "arrays"]


def test_added_gradients_and_transforms_equal_those_of_one_capture(model: torch.nn.Module, tmp_path: Path) -> None:
    double = flexcache.Transform("double", "resid_post", torch.nn.Softplus(), layers=[2])
    asked: dict[str, Any] = {"sites": ["resid_post", "resid_post.grad", "mlp_out.grad"], "transforms": [double]}
    whole = capture(model, tmp_path / "whole.zarr", **asked)
    path = tmp_path / "run.zarr"
    capture(model, path, sites=["resid_post", "resid_post.grad"])
    flexcache.extend(model, None, path, **asked, **QUIET)
    assert shard_hashes(path) == shard_hashes(whole.path)
    store = flexcache.open(path)
    assert [*store.ledger] == [*whole.ledger]
    assert store.spec == whole.spec
    assert flexcache.verify(path).sound
    with pytest.raises(MismatchError, match="all sites and layers of the store"):
        flexcache.extend(model, None, path, NEW, **QUIET)
    flexcache.extend(model, None, path, NEW, transforms=[double], sites=asked["sites"], **QUIET)
    check_recomputed(model, path, transforms=[double])


def test_max_tokens_counts_old_and_new_documents(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    old = capture(model, path, layers=[1]).n_rows
    sizes = [len(document["tokens"]) for document in NEW]
    for count in (7, 12):
        most = old + sum(sizes[:count])
        given = {"max_tokens": most, "new_only": count > 7}
        store = flexcache.extend(model, None, path, NEW, **given, **QUIET)
        assert set(store.documents.column("id").to_pylist()) == {document["id"] for document in OLD + NEW[:count]}
        assert store.n_rows == most
        assert flexcache.extend(model, None, path, NEW, **given, **QUIET).n_rows == most
    assert store.provenance.history[-1]["extended_by"]["max_tokens"] == most
    check_recomputed(model, path)


def test_a_corpus_that_max_tokens_ended_is_continued(model: torch.nn.Module, tmp_path: Path) -> None:
    corpus, path = tmp_path / "corpus.jsonl", tmp_path / "run.zarr"
    corpus.write_text("\n".join(json.dumps(document) for document in OLD))
    first = flexcache.capture(model, None, corpus, path, layers=[1], max_tokens=100, **QUIET)
    assert flexcache.extend(model, None, path, corpus, max_tokens=100, **QUIET).n_rows == first.n_rows
    assert 300 <= flexcache.extend(model, None, path, corpus, max_tokens=300, **QUIET).n_rows < 330
    store = flexcache.extend(model, None, path, corpus, **QUIET)
    assert sorted(store.documents.column("id").to_pylist()) == sorted(document["id"] for document in OLD)


def test_new_documents_are_captured_at_all_sites_although_some_are_named(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.zarr"
    capture(model, path, sites=["resid_post", "mlp_out"], layers=[1])
    store = flexcache.extend(model, None, path, NEW, sites=["resid_post"], layers=[1])
    assert store.sites == ("resid_post", "mlp_out")
    assert len(store.documents) == 110
    check_recomputed(model, path)
    told = "".join(capsys.readouterr()).replace("\n", "")
    assert f"→ {path}" in told
    assert ".growing" not in told, "where an extension is made is not where the user finds it"


def test_gradients_of_another_objective_are_not_added(model: torch.nn.Module, tmp_path: Path) -> None:
    path, objective = tmp_path / "run.zarr", LogitDifference(5, 6)
    capture(model, path, sites=["resid_post.grad"], layers=[1], objective=objective)
    with pytest.raises(MismatchError, match="the objective differs"):
        flexcache.extend(model, None, path, NEW, **QUIET)
    flexcache.extend(model, None, path, NEW, objective=objective, **QUIET)
    check_recomputed(model, path, objective=objective)


def test_a_damaged_unit_of_an_extended_store_is_repaired(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    capture(model, path, layers=[1])
    flexcache.extend(model, None, path, NEW, **QUIET)
    flexcache.extend(model, None, path, layers=[1, 2], **QUIET)
    expected = shard_hashes(path)
    store = flexcache.open(path)
    shared = 1 + max(unit for unit in range(store.n_units) if unit * store.shard_rows < store.n_rows // 2)
    for layer, unit in ((1, 0), (2, shared), (1, store.n_units - 1)):
        shard = path / f"resid_post/c/{layer}/{unit}/0"
        shard.write_bytes(shard.read_bytes()[:-7] + b"damaged")
    assert set(flexcache.repair(path).units) == {0, shared, store.n_units - 1}
    capture(model, path, layers=[1, 2])
    assert shard_hashes(path) == expected


def test_an_own_batch_budget_is_recorded(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    before = capture(model, path, layers=[1])
    shared = before.n_rows // before.shard_rows
    assert before.n_rows % before.shard_rows
    store = flexcache.extend(model, None, path, NEW, batch_tokens=64, **QUIET)
    record = store.ledger.read_record(shared)
    assert record.batch_tokens == 64
    assert record.fingerprint["carried"]["batch_tokens"] == 128
    assert not any(item.wrong for item in flexcache.recompute(model, path, units=1000))


def test_contradictory_extensions_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    capture(model, path, layers=[1])
    files = sorted(p.relative_to(path) for p in path.rglob("*"))
    with pytest.raises(ConfigError, match="everything that is asked for"):
        flexcache.extend(model, None, path, **QUIET)
    with pytest.raises(ConfigError, match="cannot be added together"):
        flexcache.extend(model, None, path, NEW, sites=["mlp_out"], **QUIET)
    other = tiny("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(MismatchError, match="weights: 1 of 39 tensors differ"):
        flexcache.extend(other, None, path, NEW, **QUIET)
    torch.set_num_threads(2)
    with pytest.raises(MismatchError, match="threads: 1 before, 2 now"):
        flexcache.extend(model, None, path, layers=[2], **QUIET)
    torch.set_num_threads(1)
    assert sorted(p.relative_to(path) for p in path.rglob("*")) == files
    assert flexcache.extend(model, None, path, layers=[1], **QUIET).layers("resid_post") == (1,)
