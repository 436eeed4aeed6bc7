from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from analysis.dataset import probe_dataset
from analysis.dataset.probe_dataset import build_dataset
from analysis.dataset.targets import DocumentTarget
from flexcache.errors import AnalysisError


def parts(store: Any) -> list[np.ndarray]:
    """(layer, its rows, hidden) of each document."""
    columns = store.columns
    return [store.values["resid_post"][:, a : a + n] for a, n in zip(columns["row_start"], columns["n_rows"])]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("last", lambda document: document[:, -1:]),
        ("first", lambda document: document[:, :1]),
        ("mean", lambda document: document.mean(1, keepdims=True, dtype=np.float64).astype(np.float32)),
        ("all", lambda document: document),
    ],
)
def test_each_row_selection_equals_plain_numpy(store: Any, rows: Any, expected: Any) -> None:
    found = build_dataset(store, "resid_post", "label", rows=rows)
    wanted = np.concatenate([expected(document) for document in parts(store)], axis=1)
    labels = np.concatenate([[y] * expected(d).shape[1] for y, d in zip(store.columns["label"], parts(store))])
    assert [found.classes[code] for code in found.y] == labels.tolist()
    for layer in found.layers:
        np.testing.assert_array_equal(found.read_layer(layer), wanted[layer])


def test_a_mean_is_read_in_blocks_even_if_a_document_is_longer_than_a_block(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_dataset(store, "resid_post", "label", rows="mean").read_layer(1)
    store.reads.clear()
    monkeypatch.setattr(probe_dataset, "BLOCK", 3)
    np.testing.assert_allclose(build_dataset(store, "resid_post", "label", rows="mean").read_layer(1), whole, rtol=1e-6)
    assert max(size for _, size in store.reads) == 3


def test_documents_without_target_group_or_rows_are_left_out_and_counted(array_store: Any) -> None:
    values = np.arange(2 * 5 * 2).reshape(2, 5, 2)
    label, group = ["a", None, "b", "b", "a", "b"], ["x", "x", None, "y", "y", "z"]
    found = build_dataset(
        array_store(values, [1, 1, 1, 1, 0, 1], label=label, group=group), "resid_post", "label", groups="group"
    )
    assert found.dropped == {"no target": 1, "no group": 1, "no rows": 1}
    assert found.source.tolist() == [0, 3, 5]
    assert found.group.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(found.read_layer(1), values[1][[0, 3, 4]])


def test_an_empty_text_is_a_missing_target_and_a_missing_group(array_store: Any) -> None:
    label, group = ["a", "", "b", "  ", "a", "b"], ["x", "x", "", "y", "y", "z"]
    store = array_store(np.zeros((1, 6, 2)), [1] * 6, label=label, group=group)
    found = build_dataset(store, "resid_post", "label", groups="group")
    assert found.classes == ("a", "b")
    assert found.dropped == {"no target": 2, "no group": 1}
    assert found.source.tolist() == [0, 4, 5]


def test_numeric_groups_ignore_nan_and_treat_both_zeros_as_equal(array_store: Any) -> None:
    store = array_store(np.zeros((1, 5, 2)), [1] * 5, label=list("abbab"), by=[0.0, -0.0, float("nan"), 1.0, 1.0])
    found = build_dataset(store, "resid_post", "label", groups="by")
    assert found.dropped == {"no group": 1}
    assert found.group.tolist() == [0, 0, 1, 1]


def test_nan_in_a_numeric_target_is_a_missing_target(array_store: Any) -> None:
    found = build_dataset(array_store(np.zeros((1, 3, 2)), [1, 1, 1], y=[0.5, float("nan"), 2.0]), "resid_post", "y")
    assert found.task == "regression"
    assert found.y.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("values", "task", "expected", "classes"),
    [
        ([True, False, True], None, [1, 0, 1], (False, True)),
        ([3, 1, 3], None, [1, 0, 1], (1, 3)),
        ([3, 1, 3], "regression", [3.0, 1.0, 3.0], ()),
        ([0.5, 1.5, 0.5], "classification", [0, 1, 0], (0.5, 1.5)),
    ],
)
def test_the_type_of_the_target_or_the_task_decides(
    array_store: Any, values: Any, task: Any, expected: Any, classes: Any
) -> None:
    found = build_dataset(array_store(np.zeros((1, 3, 2)), [1, 1, 1], y=values), "resid_post", "y", task=task)
    assert (found.y.tolist(), found.classes) == (expected, classes)


@pytest.mark.parametrize("label", [[1, 0, None, 1], [5, 3, None, 5], ["b", "a", None, "b"], [True, False, None, True]])
def test_a_missing_label_does_not_make_a_classification_a_regression(array_store: Any, label: list[Any]) -> None:
    """Labels as pandas hands them over: integers with a missing value are floating-point numbers with NaN."""
    store = array_store(np.zeros((1, 4, 2)), [1] * 4, y=pa.array(pd.Series(label), from_pandas=False))
    found = build_dataset(store, "resid_post", "y")
    assert found.task == "classification"
    assert found.classes == tuple(sorted({value for value in label if value is not None}))
    assert [found.classes[code] for code in found.y] == [value for value in label if value is not None]
    assert found.dropped == {"no target": 1}


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_more_than_two_whole_numbers_as_floats_need_a_task(array_store: Any, task: Any, kind: Any) -> None:
    stars = np.array([1, 2, 3, np.nan, 3], kind)
    store = array_store(np.zeros((1, 5, 2)), [1] * 5, stars=stars)
    for target in ("stars", DocumentTarget("stars", lambda _: stars)):
        with pytest.raises(AnalysisError, match=r"classes or a quantity[\s\S]*1, 2, 3[\s\S]*task=") as raised:
            build_dataset(store, "resid_post", target)
        assert "--task" in str(raised.value.remedy)
    found = build_dataset(store, "resid_post", "stars", task=task)
    assert (found.task, found.task_reason) == (task, "as requested")
    assert found.classes == ((1, 2, 3) if task == "classification" else ())
    assert found.y.tolist() == ([0, 1, 2, 2] if task == "classification" else [1, 2, 3, 3])


@pytest.mark.parametrize(
    ("values", "task", "reason"),
    [
        ([0.5, 1.0, 2.0], "regression", "its values are numbers with decimals"),
        ([0.0, 1.0, 1.0], "classification", "its values are 0 and 1, as floating-point numbers"),
        ([0, 1, 2], "classification", "its values are int64"),
        (["a", "b", "b"], "classification", "its values are text"),
        ([True, False, True], "classification", "its values are bool"),
    ],
)
def test_the_reason_for_the_task_is_told(array_store: Any, values: list[Any], task: str, reason: str) -> None:
    found = build_dataset(array_store(np.zeros((1, 3, 2)), [1] * 3, y=values), "resid_post", "y")
    assert (found.task, found.task_reason) == (task, reason)


def test_groups_keep_rows_of_documents_or_equal_values_together(store: Any) -> None:
    counts = store.columns["n_rows"]
    document = np.repeat(np.arange(len(counts)), counts)
    asked = {
        groups: build_dataset(store, "resid_post", "label", rows="all", groups=groups)
        for groups in (None, "document", "group")
    }
    assert asked[None].n_groups == counts.sum()
    assert asked["document"].group.tolist() == document.tolist()
    assert asked["group"].group.tolist() == (document // 3).tolist()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", (0, 1, 2)), (1, (1,)), (-1, (2,)), ([2, 0], (0, 2)), ("1:", (1, 2)), ("::2", (0, 2))],
)
def test_layers_are_resolved_as_in_a_capture(store: Any, layers: Any, expected: Any) -> None:
    assert build_dataset(store, "resid_post", "label", layers=layers).layers == expected


def test_a_module_path_has_one_array_and_no_layers(array_store: Any) -> None:
    values = np.arange(8.0).reshape(4, 2)
    found = build_dataset(array_store(values, [2, 2], label=["a", "b"]), "model.norm", "label")
    assert found.layers == (None,)
    np.testing.assert_array_equal(found.read_layer(None), values[[1, 3]])


def test_a_pooled_store_uses_the_row_that_it_holds(array_store: Any) -> None:
    pooled = array_store(np.zeros((1, 2, 2)), [1, 1], rows="mean", label=["a", "b"])
    assert build_dataset(pooled, "resid_post", "label").rows == "mean"
    assert build_dataset(pooled, "resid_post", "label", rows="all").rows == "mean"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "resid_pots"}, "did you mean resid_post"),
        ({"target": "lable"}, "did you mean label"),
        ({"groups": "grp"}, "did you mean group"),
        ({"target": "spans"}, "expected: text, numbers or booleans"),
        ({"target": "one"}, "'same' in all 120 documents"),
        ({"target": "nothing"}, "no document can be used"),
        ({"target": "label", "task": "regression"}, "cannot be a regression"),
        ({"rows": "lats"}, "did you mean last"),
        ({"layers": 9}, "no layer 9"),
    ],
)
def test_an_impossible_dataset_is_refused_with_the_available_names(
    make_store: Any, arguments: Any, message: str
) -> None:
    store = make_store(spans=[[1]] * 120, one=["same"] * 120, nothing=[None] * 119 + [float("nan")])
    question = {"site": "resid_post", "target": "label", **arguments}
    with pytest.raises(Exception, match=message) as raised:
        build_dataset(store, **question)
    assert type(raised.value).__module__ == "flexcache.errors"


def test_a_row_that_was_not_captured_is_refused(array_store: Any) -> None:
    pooled = array_store(np.zeros((1, 2, 2)), [1, 1], rows="last", label=["a", "b"])
    with pytest.raises(AnalysisError, match="does not hold the first of each document"):
        build_dataset(pooled, "resid_post", "label", rows="first")


def test_a_layer_that_was_not_captured_is_refused_as_a_number_and_skipped_in_a_slice(real_store: Any) -> None:
    target = next(name for name in real_store.documents.column_names if "script" in name)
    with pytest.raises(AnalysisError, match="layer 1 of resid_post was not captured"):
        build_dataset(real_store, "resid_post", target, layers=[0, 1])
    assert build_dataset(real_store, "resid_post", target, layers="0:3").layers == (0, 2)
    assert build_dataset(real_store, "resid_post", target, layers=-1).layers == (2,)


def test_a_value_that_is_not_finite_names_its_document(store: Any) -> None:
    store.values["resid_post"][1, store.columns["row_start"][7], 3] = np.inf
    found = build_dataset(store, "resid_post", "label", rows="first")
    found.read_layer(0)
    with pytest.raises(AnalysisError, match="layer 1, document 'd7'"):
        found.read_layer(1)


def test_samples_of_a_real_store_equal_its_rows(real_store: Any) -> None:
    target = next(name for name in real_store.documents.column_names if "script" in name)
    found = build_dataset(real_store, "resid_post", target)
    np.testing.assert_array_equal(
        found.read_layer(2), real_store.read("resid_post", layer=2, rows=real_store.rows(position=-1))
    )
    assert found.texts == tuple(real_store.documents["text"].to_pylist())


@pytest.mark.parametrize("target", [None, 3, ["pos"], {"a": 1}, np.arange(4), b"label"])
def test_an_invalid_target_is_refused(store: Any, target: Any) -> None:
    with pytest.raises(AnalysisError, match=r"not a target[\s\S]*column of the documents[\s\S]*DocumentTarget\(name"):
        build_dataset(store, "resid_post", target)


def test_a_document_target_takes_any_values(store: Any) -> None:
    values = np.arange(len(store.documents)) % 2
    found = build_dataset(store, "resid_post", DocumentTarget("parity", lambda _: values), rows="last")
    assert np.array_equal(found.y, values[found.source])
    with pytest.raises(AnalysisError, match=r"another number of values[\s\S]*parity"):
        build_dataset(store, "resid_post", DocumentTarget("parity", lambda _: values[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": np.arange(4)}, "groups cannot be read"),
        ({"groups": ["label"]}, "groups cannot be read"),
        ({"task": "classify"}, "task cannot be 'classify'"),
    ],
)
def test_invalid_groups_and_tasks_are_refused(store: Any, options: Any, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        build_dataset(store, "resid_post", "label", **options)


def test_a_site_that_is_not_text_is_refused(store: Any) -> None:
    with pytest.raises(AnalysisError, match="no site None"):
        build_dataset(store, None, "label")  # type: ignore[arg-type]
