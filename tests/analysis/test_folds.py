from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.dataset.probe_dataset import build_dataset
from analysis.probes.evaluation import folds
from flexcache.errors import AnalysisError


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_group_is_never_in_two_folds(array_store: Any, data: st.DataObject) -> None:
    n = data.draw(st.integers(12, 40))
    integers = st.integers
    counts = data.draw(st.lists(integers(1, 4), min_size=n, max_size=n))
    label = data.draw(st.lists(integers(0, 2), min_size=n, max_size=n))
    group = data.draw(st.lists(integers(0, 15), min_size=n, max_size=n))
    target = [value + 0.5 for value in label] if data.draw(st.booleans()) else label
    groups = data.draw(st.sampled_from([None, "document", "group"]))
    cv, seed = data.draw(integers(2, 5)), data.draw(integers(0, 9))
    assume(len(set(label)) > 1)
    store = array_store(np.zeros((1, sum(counts), 1)), counts, label=target, group=group)
    dataset = build_dataset(store, "resid_post", "label", rows="all", groups=groups)
    try:
        fold = folds.assign(dataset, cv, seed)
    except AnalysisError:
        assume(False)
    assert sorted(set(fold)) == list(range(cv))
    assert len({(g, f) for g, f in zip(dataset.group, fold)}) == dataset.n_groups
    if groups != "group" and groups is not None:
        assert len({(d, f) for d, f in zip(dataset.document, fold)}) == dataset.n_documents
    assert (folds.assign(dataset, cv, seed) == fold).all()


def test_folds_balance_the_classes(make_store: Any) -> None:
    dataset = build_dataset(make_store(200), "resid_post", "label", groups="document")
    fold = folds.assign(dataset, 5, 0)
    shares = np.array([dataset.y[fold == number].mean() for number in range(5)])
    assert np.ptp(shares) < 0.03


@pytest.mark.parametrize(
    ("label", "group", "cv", "message"),
    [
        ("ab" * 6, "xxxxyyyyzzzz", 5, "fewer groups than folds"),
        ("a" * 9 + "bbb", "abcdefghijkl", 4, "a class is smaller than the number of folds"),
        ("ab" * 6, "abcdefghijkl", 1, "at least two folds"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(array_store: Any, label: str, group: str, cv: int, message: str) -> None:
    store = array_store(np.zeros((1, 12, 1)), [1] * 12, label=list(label), group=list(group))
    with pytest.raises(AnalysisError, match=message):
        folds.assign(build_dataset(store, "resid_post", "label", groups="group"), cv, 0)


def test_trainable_is_true_if_every_class_remains_without_some_folds() -> None:
    y, fold = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 0, 1])
    assert folds.trainable(y, fold, 3, without=1)
    assert not folds.trainable(y, fold, 3, without=2)
