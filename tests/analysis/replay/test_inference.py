from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats

from analysis import replay
from analysis.replay.sweeps.effects import largest_cells
from analysis.replay.sweeps.inference import sign_flip
from tests.analysis.replay.conftest import DOCUMENTS
from tests.models import HIDDEN

QUIET: dict[str, Any] = {"progress": False}


def step_down(values: np.ndarray) -> np.ndarray:
    """Adjusted p-values by the definition, one flip and one cell at a time; each document is a group."""
    scale = np.sqrt((values**2).sum(0))
    observed = np.abs(values.sum(0)) / scale
    order = np.argsort(-observed, kind="stable")
    adjusted, before = np.empty(len(order)), 0.0
    for rank, cell in enumerate(order):
        left = order[rank:]
        count = 0
        signs = [np.array(chosen) for chosen in product((-1, 1), repeat=len(values))]
        for chosen in signs:
            largest = max(abs((chosen * values[:, other]).sum()) / scale[other] for other in left)
            count += largest >= observed[cell] - 1e-9
        before = adjusted[cell] = max(before, count / len(signs))
    return adjusted


def test_adjusted_p_values_are_those_of_the_step_down_definition() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((7, 5)) + np.array([2.5, 1.0, 0, 0, 0])
    found = sign_flip(values, np.arange(7))
    np.testing.assert_allclose(found.adjusted, step_down(values))
    assert (found.adjusted >= found.p).all()
    for cell in range(5):
        plain = scipy.stats.permutation_test(
            (values[:, cell],), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert found.p[cell] == pytest.approx(plain.pvalue)


def test_a_single_cell_needs_no_adjustment() -> None:
    values = np.random.default_rng(1).standard_normal((40, 1)) + 0.3
    found = sign_flip(values, np.arange(40))
    assert found.adjusted == found.p


def test_a_cell_without_values_is_nan_and_does_not_change_the_others() -> None:
    values = np.random.default_rng(1).standard_normal((9, 2, 3))
    alone = sign_flip(values[:, :1], np.arange(9))
    values[:, 1] = np.nan
    found = sign_flip(values, np.arange(9))
    assert np.isnan([found.p[1], found.adjusted[1]]).all()
    np.testing.assert_array_equal(found.adjusted[:1], alone.adjusted)
    unchanged = sign_flip(np.zeros((9, 2)), np.arange(9))
    assert np.array_equal(unchanged, np.ones((2, 2)))


def test_the_chance_of_a_false_finding_on_a_map_is_the_level() -> None:
    """Simulate 150 maps of 100 dependent cells, 5 of them true: about 5 % have a false finding, and power remains."""
    rng, maps = np.random.default_rng(0), 150
    false, uncorrected, found = 0, 0, 0.0
    for number in range(maps):
        values = rng.standard_normal((20, 100)) + 0.7 * rng.standard_normal((20, 1))
        values[:, :5] += 2
        test = sign_flip(values, np.arange(20), flips=500, seed=number)
        false += bool((test.adjusted[5:] < 0.05).any())
        uncorrected += bool((test.p[5:] < 0.05).any())
        found += float((test.adjusted[:5] < 0.05).mean())
    assert false <= scipy.stats.binom(maps, 0.05).ppf(0.995)
    assert uncorrected > 0.8 * maps, "without a correction nearly every map has one"
    assert found > 0.95 * maps


@pytest.fixture
def noisy(captured: Any) -> tuple[Any, Any]:
    """A store and a model whose outputs depend slightly on the number of lines of a forward."""
    store, model = captured()
    model.model.norm.register_forward_hook(lambda _, args, output: output * (1 + 1e-3 * len(output)))
    return store, model


def test_the_noise_floor_is_the_distance_of_a_replay_that_changes_nothing(noisy: Any) -> None:
    store, model = noisy
    edits = replay.Steer(np.ones(HIDDEN), [0, 3]) | replay.Scale(1.0)
    at = replay.grid(layers=[1, 2])
    r = replay.sweep(
        store, model, at, edits, ["kl", "loss"], ["identity", "norm_matched"], copies=3, accept=["behavior"], **QUIET
    )
    identity = r.results["value"].sel(arm="identity", edit="Scale", alpha=1.0).squeeze()
    expected = np.abs(identity - r.results["unedited"].sel(edit="Scale")).max("document").transpose("layer", "metric")
    np.testing.assert_array_equal(r.results["noise_floor"], expected)
    assert (r.results["noise_floor"] > 0).all()
    effect = r.effect()
    kl = effect["change"].sel(arm="edit", metric="kl").squeeze()
    assert (kl.sel(edit="Steer", alpha=0) > 0).all(), "rounding alone: never negative, but no effect"
    shown = {(str(cell["edit"].values), float(cell["alpha"])) for cell in largest_cells(effect, "kl", 99)}
    assert shown == {("Steer", 3.0)}
    assert "Noise floor" in str(r.table().caption)


def test_the_largest_effects_are_ranked_by_the_change_and_leave_out_strength_0(captured: Any) -> None:
    store, model = captured()
    edits = replay.Steer(np.ones(HIDDEN), [0, 1]) | replay.Zero()
    r = replay.sweep(store, model, replay.grid(layers=[0, 2], positions="first"), edits, ["loss"], **QUIET)
    effect = r.effect()
    cells = list(largest_cells(effect, "loss", 99))
    assert {float(cell["alpha"]) for cell in cells} == {1.0}
    changes = [abs(float(cell["change"].sel(arm="edit", metric="loss"))) for cell in cells]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 4
    assert len(r.table().rows) == 4
    assert [str(column.header) for column in r.table(2).columns][-1] == "p adjusted,\nidentity"
    assert len(r.table(2).rows) == 2


def test_an_edit_without_any_value_has_an_empty_map(captured: Any) -> None:
    store, model = captured()
    name = store.documents["id"][0].as_py()
    edits = replay.Zero() | replay.Patch({name: name})
    found = replay.sweep(store, model, replay.grid(layers=[0, 2], positions=["first", "last"]), edits, ["kl"], **QUIET)
    panels = [axes for axes in found.plot().axes if axes.images]
    assert [np.isfinite(axes.images[0].get_array().filled(np.nan)).all() for axes in panels] == [True, False]


def test_only_tests_against_no_edit_leave_metrics_out(captured: Callable[..., Any]) -> None:
    asked: dict[str, Any] = {"at": replay.grid(layers=1), "edit": replay.Zero(), "metrics": ["kl"], "progress": False}
    for baseline, told in (("identity", True), ("random_direction", False)):
        effect = replay.sweep(*captured(), **asked, baselines=[baseline]).effect()
        assert ("kl: not tested" in effect.attrs["tests"]) is told
        assert f"over {len(DOCUMENTS)} groups" in effect.attrs["tests"]
