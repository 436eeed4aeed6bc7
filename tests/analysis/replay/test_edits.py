from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

from analysis import replay
from analysis.replay import edits
from analysis.replay.edits.edit import KINDS, Edit, from_json, label_edits, list_edits
from analysis.replay.edits.edit_context import EditContext, StoreRows
from analysis.replay.sweeps.inference import sign_flip
from analysis.statistics.bootstrap import mean_interval
from flexcache.errors import AnalysisError
from tests.models import HIDDEN

RNG = np.random.default_rng(0)
VECTOR = RNG.standard_normal(HIDDEN)
ALL: list[Edit] = [
    replay.Identity(),
    replay.Zero(),
    replay.Zero((3, 5)),
    replay.Mean(over="position"),
    replay.Mean(dims=(1,), value=VECTOR),
    replay.Scale(0.5),
    replay.Scale([1, 2], dims=(0,)),
    replay.Clamp(-0.1, 0.1),
    replay.SetNeurons((3, 9), (1.0, -1.0)),
    replay.Steer(VECTOR, 2.0),
    replay.ProjectOut(VECTOR),
    replay.Erase.fit(RNG.standard_normal((50, HIDDEN)), RNG.integers(3, size=50)),
    replay.Noise(0.1),
    replay.NormMatched(replay.Zero()),
    replay.Patch({"doc-0": "doc-1"}),
    replay.Patch("doc-1", align={0: 1}),
    replay.Interpolate("doc-1", t=[0.0, 0.5]),
    replay.Interchange("doc-1", directions=RNG.standard_normal((2, HIDDEN))),
    replay.Resample(7),
    replay.OnHeads(replay.Scale([0.0, 2.0]), 3, 4),
    replay.OnHeads(replay.Patch("doc-1"), (0, 2), 4),
    replay.ByLayer({0: replay.Zero(), 1: replay.Steer(VECTOR)}),
    replay.Scale(2.0) >> replay.Zero((1,)) >> replay.Steer(VECTOR),
    replay.Function("tests.analysis.replay.test_edits:doubled"),
    replay.Fitted(replay.Steer(VECTOR, [1.0, 2.0]), "label", ("doc-1", "doc-2"), groups="author"),
]
"""Every kind of edit; add new ones here to test them against the contract."""


def doubled(module: Any, activation: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
    return activation * 2


@pytest.fixture(scope="module")
def context(captured: Callable[..., Any]) -> EditContext:
    """Return the context of five tokens of three documents in layer 1."""
    store, model = captured()
    source = StoreRows(store)
    lengths = source.lengths
    long = np.flatnonzero(lengths > 4)[:3]
    lines, documents = np.array([0, 0, 1, 2, 2]), long[[0, 0, 1, 2, 2]]
    return EditContext(
        source, "resid_post", 1, model.model.layers[1], lines, documents, np.array([0, 3, 2, 1, 4]), seed=5
    )


@pytest.fixture
def x(context: EditContext) -> torch.Tensor:
    return context.source.read_rows("resid_post", 1, context.source.row_start[context.documents] + context.positions)


def test_every_kind_of_edit_is_held_to_the_contract_and_exported() -> None:
    for module in pkgutil.iter_modules(edits.__path__, f"{edits.__name__}."):
        importlib.import_module(module.name)
    kinds = {kind for kind in KINDS.values() if kind.__module__.startswith("analysis.") and "change" in vars(kind)}
    assert kinds == {type(edit) for edit in ALL}
    assert {kind.__name__ for kind in kinds} <= set(replay.__all__)


@pytest.mark.parametrize("edit", ALL, ids=repr)
def test_an_edit_survives_json_and_prints_its_settings(edit: Edit) -> None:
    again = from_json(json.loads(json.dumps(edit.to_json())))
    assert again == edit
    assert hash(again) == hash(edit)
    assert repr(again) == repr(edit)
    assert type(edit).__name__ in repr(edit) or ">>" in repr(edit)
    with pytest.raises(AttributeError):
        edit.nothing = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("edit", [e for e in ALL if len(e.strengths) == 1 and "ByLayer" not in repr(e)], ids=repr)
def test_a_change_keeps_the_shape_and_does_not_modify_its_input(
    edit: Edit, x: torch.Tensor, context: EditContext
) -> None:
    before = x.clone()
    single = edit.at_strength(edit.strengths[0])
    after = single.change(x, context)
    assert after.shape == x.shape
    assert torch.equal(x, before)
    assert torch.isfinite(after).all()
    assert torch.equal(after, single.change(x, context)), "the same twice"


def test_each_edit_equals_its_formula(x: torch.Tensor, context: EditContext) -> None:
    zero = replay.Zero((3, 5)).change(x, context)
    assert (zero[:, [3, 5]] == 0).all()
    assert np.array_equal(np.delete(zero.numpy(), [3, 5], 1), np.delete(x.numpy(), [3, 5], 1))
    assert torch.equal(replay.Scale(0.5).change(x, context), x / 2)
    assert replay.Clamp(-0.1, 0.1).change(x, context).abs().max() <= 0.1
    assert replay.SetNeurons((3, 9), (1.0, -1.0)).change(x, context)[:, [3, 9]].tolist() == [[1, -1]] * 5
    steered = replay.Steer(VECTOR, 2).change(x, context)
    np.testing.assert_allclose((steered - x).numpy(), np.tile(2 * VECTOR, (5, 1)), atol=1e-5)
    flat = replay.ProjectOut(np.stack([VECTOR, 2 * VECTOR])).change(x, context)
    np.testing.assert_allclose(flat @ torch.from_numpy(VECTOR).float(), 0, atol=1e-5)
    noise = replay.Noise(0.1).change(x, context)
    np.testing.assert_allclose((noise - x).norm(dim=1), 0.1 * x.norm(dim=1), rtol=1e-5)
    matched = replay.NormMatched(replay.Steer(VECTOR, 3)).change(x, context)
    np.testing.assert_allclose((matched - x).norm(dim=1), np.full(5, 3 * np.linalg.norm(VECTOR)), rtol=1e-5)


def test_store_means_are_means_over_the_stores_rows(x: torch.Tensor, context: EditContext) -> None:
    store = context.source.store
    rows, position = store.read("resid_post", 1), store.coordinates["position"].values
    whole = replay.Mean().change(x, context)
    np.testing.assert_allclose(whole, np.tile(rows.mean(0), (5, 1)), atol=1e-5)
    by_position = replay.Mean(dims=(4,), over="position").change(x, context)
    for line, place in enumerate(context.positions):
        assert float(by_position[line, 4]) == pytest.approx(rows[position == place, 4].mean(), abs=1e-5)
    assert torch.equal(by_position[:, :4], x[:, :4])


def test_patches_take_the_donors_row_at_the_aligned_position(x: torch.Tensor, context: EditContext) -> None:
    store = context.source.store
    ids = store.documents["id"].to_pylist()
    lengths = context.source.lengths
    longest = int(lengths.argmax())
    patched = replay.Patch(ids[longest]).change(x, context)
    expected = store.read("resid_post", 1, store.rows(ids[longest]))[context.positions]
    assert np.array_equal(patched, expected)
    ends = replay.Patch(ids[longest], align="end").change(x, context)
    places = context.positions + lengths[longest] - lengths[context.documents]
    assert np.array_equal(ends, store.read("resid_post", 1, store.rows(ids[longest]))[places])
    context.left_out.clear()
    pairs = replay.Patch(ids[longest], align={0: 2}).change(x, context)
    assert np.array_equal(pairs[0], store.read("resid_post", 1, store.rows(ids[longest]))[2])
    assert torch.equal(pairs[1:], x[1:])
    assert context.left_out == {0, 1, 2}
    context.left_out.clear()
    basis = np.eye(HIDDEN)[:2]
    swapped = replay.Interchange(ids[longest], directions=basis).change(x, context)
    np.testing.assert_allclose(swapped[:, :2], expected[:, :2], atol=1e-5)
    np.testing.assert_allclose(swapped[:, 2:], x[:, 2:], atol=1e-5)
    half = replay.Interpolate(ids[longest], t=0.5).change(x, context)
    np.testing.assert_allclose(half, (x.numpy() + expected) / 2, atol=1e-6)


def test_resampling_takes_the_same_positions_of_one_other_document(x: torch.Tensor, context: EditContext) -> None:
    store = context.source.store
    found = replay.Resample(1).change(x, context).numpy()
    rows, position = store.read("resid_post", 1), store.coordinates["position"].values
    document = store.coordinates["document"].values
    owners = []
    for line in range(5):
        (row,) = np.flatnonzero((rows == found[line]).all(1))
        assert position[row] == context.positions[line]
        assert document[row] != context.documents[line]
        owners.append(document[row])
    assert owners[0] == owners[1]
    assert owners[3] == owners[4]


def test_leace_leaves_nothing_for_a_linear_probe() -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(3, size=600)
    X = rng.standard_normal((600, 8)) @ rng.standard_normal((8, 8)) + 2 * np.eye(3, 8)[y]
    X[:, 7] = 0.5 * X[:, 6]  # a direction without variance
    assert LogisticRegression(max_iter=500).fit(X, y).score(X, y) > 0.6
    eraser = replay.Erase.fit(X, y)
    erased = eraser.change(torch.from_numpy(X), None).numpy()  # type: ignore[arg-type]
    onehot = np.eye(3)[y]
    covariance = (erased - erased.mean(0)).T @ (onehot - onehot.mean(0)) / len(y)
    assert np.abs(covariance).max() < 1e-12
    majority = np.bincount(y).max() / len(y)
    assert LogisticRegression(max_iter=500).fit(erased, y).score(erased, y) <= majority + 0.01
    again = eraser.change(torch.from_numpy(erased), None).numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(again, erased, atol=1e-9)
    assert eraser.left.shape == (8, 2)
    # it is the least change: no other projection along the same concept moves whitened data less (Belrose et al., 4.2)
    moved = np.linalg.norm(erased - X)
    naive = X - np.linalg.lstsq(onehot - onehot.mean(0), X - X.mean(0), rcond=None)[0].T[:, y].T
    assert np.isfinite(moved)
    assert not np.allclose(naive, erased)


def test_leace_is_fitted_to_the_stores_rows(captured: Callable[..., Any]) -> None:
    store, _ = captured()
    found = replay.Erase.fit_store(store, "label", "resid_post", 1, held_out=0)
    eraser = found.edit
    assert isinstance(eraser, replay.Erase)
    assert found.documents == tuple(store.documents["id"].to_pylist())
    rows = store.rows(position=-1)
    labels = np.array(store.documents["label"].to_pylist())
    same = replay.Erase.fit(store.read("resid_post", 1, rows), labels)
    np.testing.assert_allclose(eraser.mean, same.mean)
    np.testing.assert_allclose(eraser.left @ eraser.right, same.left @ same.right, atol=1e-8)
    with pytest.raises(AnalysisError, match="nothing to erase"):
        replay.Erase.fit(np.ones((5, 3)), np.arange(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replay.Steer("v"), "Steer"),
        (lambda: replay.Steer(np.array([np.nan])), "Steer"),
        (lambda: replay.Zero(3), "Zero"),  # type: ignore[arg-type]
        (lambda: replay.Clamp(), "Clamp"),
        (lambda: replay.SetNeurons((1, 2), (1.0, 2.0, 3.0)), "SetNeurons"),
        (lambda: replay.Mean(over="document"), "Mean"),
        (lambda: replay.Patch("a", align="middle"), "Patch"),
        (lambda: replay.Noise("much"), "Noise"),  # type: ignore[arg-type]
    ],
)
def test_invalid_settings_raise_an_error_at_once(make: Callable[[], Edit], message: str) -> None:
    with pytest.raises(AnalysisError, match="cannot be made of this") as error:
        make()
    assert error.value.where == message


def test_the_mean_of_a_store_is_read_from_json_and_printed() -> None:
    assert from_json({"kind": "Mean", "over": "position"}) == replay.Mean(over="position")
    assert repr(replay.Mean()) == "Mean(dims=None, over='all', value=None)"


def test_only_edits_of_this_package_are_made_from_json() -> None:
    with pytest.raises(AnalysisError, match="no edit 'Zeroo'") as error:
        from_json({"kind": "Zeroo"})
    assert "did you mean Zero" in str(error.value)
    with pytest.raises(AnalysisError, match="cannot be made"):
        from_json({"kind": "Zero", "dim": [1]})


def test_an_edit_with_several_strengths_cannot_be_applied(x: torch.Tensor, context: EditContext) -> None:
    edit = replay.Steer(VECTOR, [0, 1]) >> replay.Zero((1,))
    assert edit.strengths == (0.0, 1.0)
    with pytest.raises(AnalysisError, match="one strength"):
        edit.change(x, context)
    assert (edit.at_strength(1.0).change(x, context)[:, 1] == 0).all()


def test_random_directions_have_the_same_length_and_number() -> None:
    steer = replay.Steer(VECTOR, 2).with_random_directions(1, HIDDEN)
    assert isinstance(steer, replay.Steer)
    assert np.linalg.norm(steer.vector) == pytest.approx(np.linalg.norm(VECTOR))
    assert abs(np.corrcoef(steer.vector, VECTOR)[0, 1]) < 0.5
    project = replay.ProjectOut(np.stack([VECTOR, RNG.standard_normal(HIDDEN)])).with_random_directions(1, HIDDEN)
    assert isinstance(project, replay.ProjectOut)
    np.testing.assert_allclose(project.directions @ project.directions.T, np.eye(2), atol=1e-10)
    assert replay.Zero().with_random_directions(1, HIDDEN) is None


@given(st.integers(2, 9), st.integers(0, 5), st.integers(0, 2**31))
def test_group_statistics_are_those_of_the_plain_formula(groups: int, missing: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = np.concatenate([np.arange(groups), rng.integers(groups, size=10)])
    values = rng.standard_normal((len(group), 2))
    values[rng.integers(len(group), size=missing), 0] = np.nan
    low, high = mean_interval(values, group, 200, seed)
    assert (low <= high)[np.isfinite(low)].all()
    p = sign_flip(values, group).p
    sums = np.array([np.nansum(values[group == g], axis=0) for g in range(groups)])
    signs = np.array(np.meshgrid(*[[1, -1]] * groups)).reshape(groups, -1).T
    expected = (np.abs(signs @ sums) >= np.abs(sums.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(p, expected)


def test_the_bootstrap_draws_groups_and_not_documents() -> None:
    rng = np.random.default_rng(0)
    effect = rng.standard_normal(20)
    values, group = np.repeat(effect, 50)[:, None], np.repeat(np.arange(20), 50)
    low, high = mean_interval(values, group, 2000, 0)
    width = 2 * student.ppf(0.975, 19) * effect.std(ddof=1) / np.sqrt(20)
    assert float(high[0] - low[0]) == pytest.approx(width, rel=0.15)
    narrow = mean_interval(values, np.arange(1000), 2000, 0)
    assert float(narrow[1][0] - narrow[0][0]) < float(high[0] - low[0]) / 4


def test_edits_of_the_same_name_are_numbered_in_results() -> None:
    edits = replay.Patch("a") | replay.Zero((1,)) | replay.Patch("b")
    assert label_edits(list_edits(edits)) == ["Patch(donor='a')", "Zero(dims=(1,))", "Patch(donor='b')"]
    pairs = replay.Patch({"a": "b"}) | replay.Patch({"b": "a"})
    assert label_edits(list_edits(pairs)) == ["Patch 1", "Patch 2"]
