from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import flexcache
from analysis import saved
from analysis.dataset.tokens import TokenTypes
from analysis.readout import lens
from analysis.statistics import geometry, moments, outliers, quantiles, similarity
from analysis.survey import PARTS, load, results_path, survey
from flexcache.errors import AnalysisError
from flexcache.store.read.shard_reader import RowReader
from tests.analysis.stores import value_store
from tests.analysis.test_moments import LENGTHS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    values = np.random.default_rng(0).normal(size=(3, sum(LENGTHS), 6)) * 5 + 1
    labels = {"label": [("a", "b")[i % 2] for i in range(len(LENGTHS))]}
    path = tmp_path_factory.mktemp("stores") / "s.zarr"
    return value_store(path, values, LENGTHS, labels=labels, dtype="bfloat16")


def few(store: flexcache.Store, folder: Path | None = None, **options: Any) -> Any:
    return survey(store, similarity_rows=300, permutations=5, folder=folder, progress=False, **options)


def test_one_read_equals_computing_each_statistic_alone(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {
        "total": moments.compute(store, "resid_post", progress=False),
        "moments": moments.compute(store, "resid_post", by=["layer", "label"], progress=False),
        "pca": geometry.pca(store, "resid_post", skip=1, progress=False, components=16),
        "quantiles": quantiles.compute(store, "resid_post", progress=False),
        "outliers": outliers.compute(store, "resid_post", progress=False),
    }
    likeness = similarity.compute(store, "resid_post", rows=300, permutations=5, progress=False)
    rows = []
    scan = RowReader._scan_shard
    monkeypatch.setattr(RowReader, "_scan_shard", lambda *a: (rows.append(len(a[-1])), scan(*a))[1])
    found = few(store, by=["layer", "label"])
    assert sum(rows) == 3 * store.n_rows
    for name, expected in alone.items():
        assert found[name].equals(expected), name
    np.testing.assert_array_equal(found["similarity"]["cka"], likeness["cka"])
    assert set(found.results) == {*PARTS, "total"} - {"lens"}


@pytest.mark.parametrize("wrong", [{"permutations": -1}, {"seed": -1}, {"similarity_rows": 0}, {"rows": 1}])
def test_numbers_that_cannot_be_used_are_refused(store: flexcache.Store, wrong: dict[str, Any]) -> None:
    with pytest.raises(AnalysisError, match=f"{next(iter(wrong))} cannot be used"):
        survey(store, progress=False, **wrong)


def test_results_are_reused_until_store_or_arguments_change(
    store: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = few(store, tmp_path)
    assert not first.reused
    again = few(store, tmp_path)
    assert again.reused
    assert set(again.results) == set(first.results)
    for name, result in first.results.items():
        xr.testing.assert_identical(again[name], result)
        assert {k: v.dtype.kind for k, v in again[name].variables.items()} == {
            k: v.dtype.kind for k, v in result.variables.items()
        }
    assert not few(store, tmp_path, only=["moments"]).reused
    assert few(store, tmp_path, only=["moments"]).reused
    monkeypatch.setattr(saved, "identity", lambda store: {"units": 1})
    assert not few(store, tmp_path, only=["moments"]).reused
    monkeypatch.setattr(saved, "versions", lambda: {"numpy": "0"})
    assert not few(store, tmp_path, only=["moments"]).reused


def test_a_lens_of_another_head_or_norm_is_not_reused(store: flexcache.Store, tmp_path: Path) -> None:
    def head(scale: float = 1.0, eps: float = 1e-6, seed: int = 0, bias: bool = False) -> lens.Head:
        weight = torch.randn(11, 6, generator=torch.Generator().manual_seed(seed))
        return lens.Head(torch.nn.RMSNorm(6, eps), weight, torch.ones(11) if bias else None, scale)

    for changed in ({}, {"scale": 2.0}, {"eps": 0.5}, {"seed": 1}, {"bias": True}):
        found = few(store, tmp_path, only=["lens"], head=head(**changed))
        assert not found.reused, changed
        assert few(store, tmp_path, only=["lens"], head=head(**changed)).reused
    tied = few(store, only=["lens"], head=head())
    assert not tied["lens"]["loss"].equals(found["lens"]["loss"])


def test_results_of_other_seeds_and_token_types_are_not_reused(store: flexcache.Store, tmp_path: Path) -> None:
    def types(codes: list[int]) -> TokenTypes:
        return TokenTypes(("a", "b"), np.array(codes * 6))

    for changed in ({"seed": 0}, {"seed": 1}, {"token_types": types([0, 1])}, {"token_types": types([1, 0])}):
        options = {"only": ["moments", "similarity"], "by": "token_type" if "token_types" in changed else "layer"}
        assert not few(store, tmp_path, **options, **changed).reused, changed
        assert few(store, tmp_path, **options, **changed).reused


def test_saved_results_are_plain_zarr_with_their_provenance(store: flexcache.Store, tmp_path: Path) -> None:
    few(store, tmp_path, only=["moments"])
    path = results_path(tmp_path, "resid_post")
    opened = xr.open_zarr(path, group="total", consolidated=False)
    assert opened["mean"].dims == ("layer", "feature")
    provenance = dict(zarr.open_group(path, mode="r").attrs)["flexcache_statistics"]
    assert provenance["of"]["rows"] == store.n_rows
    assert provenance["rows_read"] == store.n_rows
    assert provenance["versions"]["numpy"] == np.__version__
    assert json.dumps(provenance)


def test_folders_without_results_are_neither_read_nor_overwritten(store: flexcache.Store, tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="no saved results"):
        load(tmp_path, "resid_post")
    path = results_path(tmp_path, "resid_post")
    path.mkdir()
    (path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(AnalysisError, match="something else"):
        few(store, tmp_path, only=["moments"])
    assert (path / "thesis.txt").exists()
    (path / "zarr.json").write_text("{")
    with pytest.raises(AnalysisError, match="cannot be read"):
        load(tmp_path, "resid_post")


def test_unknown_parts_are_refused_with_the_nearest_name(store: flexcache.Store) -> None:
    with pytest.raises(AnalysisError, match="did you mean quantiles"):
        survey(store, only=["quantile"])
    with pytest.raises(AnalysisError, match="did you mean scheduler"):
        survey(store, only=["moments"], schedular="threads")
    with pytest.raises(AnalysisError, match="there are: total"):
        few(store, only=["moments"])["lens"]
