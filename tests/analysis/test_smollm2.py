"""Known geometry of SmolLM2, reproduced in a store of real text. Run it with  pytest -m slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import flexcache
from analysis.dataset import tokens
from analysis.statistics import erasure, outliers
from analysis.survey import Survey, survey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("not config.getoption('-m')", reason="slow: run with -m slow"),
]


@pytest.fixture(scope="module")
def model() -> Path:
    from pipelines.demo import assets

    try:
        return assets.smollm2()
    except assets.AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    from flexcache.model import ModelSource
    from pipelines import capture
    from pipelines.config import CaptureConfig, DocumentsSource
    from pipelines.demo import assets

    config = CaptureConfig(
        model=ModelSource(name=str(model), dtype="bfloat16"),
        documents=DocumentsSource(path=str(assets.vader_sample(200))),
        store=tmp_path_factory.mktemp("stores") / "smollm2.zarr",
        sites={"resid_post": "all"},
    )
    return capture.run(config, progress=False)


@pytest.fixture(scope="module")
def found(store: flexcache.Store, model: Path) -> Survey:
    return survey(store, head=model, similarity_rows=600, permutations=5, progress=False)


def test_a_massive_activation_sits_in_dim_507_of_the_first_token(store: flexcache.Store, found: Survey) -> None:
    lines = outliers.massive(found["outliers"], store)
    layers = {line["layer"] for line in lines if line["dim"] == 507}
    assert set(range(12, 28)) <= layers
    assert min(layers) >= 11  # the twelfth block writes it
    assert {line["position"] for line in lines} == {0}
    assert 20_000 < abs(lines[0]["value"]) < 35_000
    first = np.flatnonzero(store.coordinates["position"].values == 0)
    assert (np.abs(store.read("resid_post", 15, first)).argmax(1) == 507).all()


def test_residual_norms_grow_by_about_a_tenth_a_layer(found: Survey) -> None:
    moments = found["moments"]
    n = moments["n"].isel(position=slice(1, None))
    norm = (moments["norm_mean"].isel(position=slice(1, None)).fillna(0) * n).sum("position") / n.sum("position")
    growth = float(norm[-1] / norm[0]) ** (1 / (len(norm) - 1))
    assert 1.07 < growth < 1.13


def test_one_dim_carries_most_of_the_cosine_before_the_last_block(found: Survey) -> None:
    share = found["outliers"]["rogue_share"].sel(part="rest")
    assert float(share.sel(layer=28)) > 0.9
    assert float(share.sel(layer=28)) == float(share.max())
    assert (found["outliers"]["cosine"].sel(part="rest", layer=slice(1, None)) > 0.25).all()


def test_the_lens_ends_at_zero_and_is_not_monotone_before(found: Survey) -> None:
    kl = found["lens"]["kl_mean"].values
    assert (found["lens"]["kl"].values[-1] == 0).all()
    assert (np.diff(kl) > 0).any()
    assert kl[:20].max() > kl[0]
    assert (np.diff(kl[22:]) < 0).all()
    assert found["lens"]["agreement"].values[0] < 0.2


def test_leace_leaves_no_linear_trace_on_the_rows_it_was_fitted_to(store: flexcache.Store, model: Path) -> None:
    words = tokens.vocabulary(tokenizer=model)
    assert words is not None
    types = tokens.token_types(words)
    layers = [1, 15, 29]
    eraser: Any = erasure.leace(store, "resid_post", "token_type", token_types=types, layers=layers, progress=False)
    classes = types.codes[store.coordinates["token_id"].values]
    target = np.eye(len(types.names))[classes]
    target -= target.mean(0)
    for layer in layers:
        rows = store.read("resid_post", layer).astype(np.float64)
        erased = erasure.erase(rows, eraser.sel(layer=layer))
        before = np.abs((rows - rows.mean(0)).T @ target).max()
        assert np.abs((erased - erased.mean(0)).T @ target).max() < 1e-8 * before
        centred = rows - rows.mean(0)
        assert LinearRegression().fit(centred, target).score(centred, target) > 0.3
        erased -= erased.mean(0)
        fitted = np.linalg.lstsq(erased / erased.std(0), target, rcond=1e-9)[0]
        assert np.abs(erased / erased.std(0) @ fitted).max() < 1e-5
