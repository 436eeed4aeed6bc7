from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import replay
from analysis.replay.edits.edit import from_json
from analysis.replay.edits.held_out import choose_fitted
from analysis.report import replayed
from flexcache.errors import AnalysisError, MismatchError
from tests.corpora import token_documents
from tests.models import HIDDEN, VOCABULARY

QUIET: dict[str, Any] = {"progress": False}
RARE = int(np.random.default_rng(0).permutation(20)[-1])
"""A document that seed 0 holds out."""
DOCUMENTS = [
    {**document, "author": f"writer {n // 3}" if n < 18 else None, "kind": ("a", "b", None)[n % 3], "rare": n == RARE}
    for n, document in enumerate(token_documents([5] * 20, vocabulary=VOCABULARY))
]


@pytest.fixture
def made(captured: Callable[..., Any]) -> tuple[Any, Any]:
    store, model = captured(documents=DOCUMENTS)
    return store, model


def means(store: Any, layer: int, ids: tuple[str, ...]) -> np.ndarray:
    """The difference of class means of some documents, from plain reads."""
    table = store.documents.to_pylist()
    rows = {
        label: [d["row_start"] + d["n_tokens"] - 1 for d in table if d["id"] in ids and d["label"] == label]
        for label in ("even", "odd")
    }
    odd, even = (store.read("resid_post", layer, rows[label]).astype(np.float64).mean(0) for label in ("odd", "even"))
    return np.asarray(odd - even)


def test_a_direction_is_fitted_to_one_half_and_judged_on_the_other(made: Any) -> None:
    store, model = made
    edit = replay.Steer.fit_store(store, "label", "resid_post", [1, 2], alpha=[0, 4])
    assert len(edit.documents) == 10
    for layer, steer in dict(edit.edit.edits).items():  # type: ignore[attr-defined]
        np.testing.assert_allclose(steer.vector, means(store, layer, edit.documents), atol=1e-5)
    at = replay.grid(layers=[1, 2])
    found = replay.sweep(store, model, at, edit, ["kl"], ["random_direction"], **QUIET)
    judged = set(found.results["document"].values)
    assert judged == {document["id"] for document in DOCUMENTS} - set(edit.documents)
    assert np.isfinite(found.results["value"]).all()
    assert found.results["edit"].values.tolist() == ["Steer by layer"]
    (saved,) = found.results.attrs["question"]["edits"]
    assert (saved["target"], saved["groups"], saved["held_out"], saved["seed"]) == ("label", "document", 0.5, 0)
    assert from_json(saved) == edit
    (split,) = found.results.attrs["splits"]
    assert split == (
        "Steer by layer, by 'label', was fitted to 10 documents and judged on 10 others (divided by documents, seed 0)."
    )
    by_hand = replay.ByLayer({layer: steer.at_strength(4) for layer, steer in edit.edit.edits})  # type: ignore[attr-defined]
    plain = replay.sweep(store, model, at, by_hand, ["kl"], documents=sorted(judged), **QUIET)
    value = found.results["value"].sel(arm="edit", alpha=4).squeeze()
    np.testing.assert_array_equal(value, plain.results["value"].sel(arm="edit").squeeze())


def test_groups_are_not_divided_and_a_document_without_one_is_its_own(made: Any) -> None:
    store, _ = made
    table = store.documents.to_pylist()
    divided = False
    for seed in range(6):
        chosen = choose_fitted(store, 0.5, "author", seed)
        fitted, held = ({d["author"] for d, one in zip(table, chosen) if one == part} for part in (True, False))
        assert (fitted & held) <= {None}
        divided |= None in fitted & held
        assert len(fitted - {None}) + sum(one for d, one in zip(table, chosen) if d["author"] is None) == 4, "of 8"
    assert divided
    assert (choose_fitted(store, 0.5, "author", 1) != choose_fitted(store, 0.5, "author", 2)).any()


def test_edits_of_several_targets_have_the_same_documents_held_out(made: Any) -> None:
    store, model = made
    edits = replay.Steer.fit_store(store, "kind", layers=2) | replay.Erase.fit_store(store, "label", layers=2)
    first, second = edits
    assert first.documents == second.documents  # type: ignore[attr-defined]
    chained = replay.NormMatched(first) >> replay.Scale(2.0)
    found = replay.sweep(store, model, replay.grid(layers=2), edits | chained, ["kl"], **QUIET)
    assert found.results.sizes["document"] == 10
    assert len(found.results.attrs["splits"]) == 2


def test_a_named_document_of_the_fit_is_left_out_and_said(made: Any, tmp_path: Path) -> None:
    store, model = made
    edit = replay.Erase.fit_store(store, "label", layers=2, groups="author", seed=3)
    held = [document["id"] for document in DOCUMENTS if document["id"] not in edit.documents]
    asked: dict[str, Any] = {"at": replay.grid(layers=2), "metrics": ["kl"], **QUIET}
    found = replay.sweep(store, model, edit=edit, documents=[held[0], *edit.documents[:2]], **asked)
    assert found.results["document"].values.tolist() == [held[0]]
    assert "2 of the named documents are left out, because an edit was fitted to them." in found.results.attrs["notes"]
    page = replayed.write(store, found, tmp_path / "page.html").read_text()
    assert "divided by whole groups of &#39;author&#39;, seed 3" in page
    with pytest.raises(AnalysisError, match="fitted to every document of the sweep"):
        replay.sweep(store, model, edit=edit, documents=edit.documents, **asked)


def test_a_fit_to_all_documents_is_judged_on_them_and_said(made: Any) -> None:
    store, model = made
    edit = replay.ProjectOut.fit_store(store, "label", layers=2, held_out=0, unit=True)
    assert np.linalg.norm(edit.edit.directions) == pytest.approx(1)  # type: ignore[attr-defined]
    found = replay.sweep(store, model, replay.grid(layers=2), edit, ["kl"], **QUIET)
    assert found.results.sizes["document"] == 20
    assert "so its effect is too large" in found.results.attrs["notes"][-1]
    assert found.results.attrs["splits"] == []


def test_a_sweep_with_another_split_is_another_sweep(made: Any, tmp_path: Path) -> None:
    store, model = made
    asked: dict[str, Any] = {"at": replay.grid(layers=2), "metrics": ["kl"], "folder": tmp_path, **QUIET}
    replay.sweep(store, model, edit=replay.Steer.fit_store(store, "label", layers=2), **asked)
    with pytest.raises(MismatchError, match="another sweep"):
        replay.sweep(store, model, edit=replay.Steer.fit_store(store, "label", layers=2, seed=1), **asked)


def test_steering_along_noise_has_no_held_out_effect(made: Any) -> None:
    """Random labels: fitted and scored on the same documents, the direction separates them; held out, it does not."""
    rng = np.random.default_rng(0)
    within, outside = [], []
    for _ in range(40):
        X, y = rng.standard_normal((40, 60)), np.arange(40) % 2
        train = rng.permutation(40) < 20
        edit = replay.Steer.fit(X[train], y[train])
        for part, scores in ((train, within), (~train, outside)):
            scores.append((X[part & (y == 1)] @ edit.vector).mean() - (X[part & (y == 0)] @ edit.vector).mean())
    assert np.mean(within) > 3
    assert abs(np.mean(outside)) < 3 * np.std(outside) / np.sqrt(40)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"held_out": 1}, "held_out cannot be used"),
        ({"held_out": 0.999}, "cannot be divided"),
        ({"held_out": True}, "held_out cannot be used"),
        ({"groups": "authors"}, "did you mean author"),
        ({"target": "score"}, "a direction needs two classes of 'score'"),
        ({"target": "rare"}, "do not have all classes of 'rare'"),
        ({"seed": -1}, "seed cannot be used"),
        ({"alpa": 2}, "did you mean alpha"),
        ({"vector": np.ones(HIDDEN)}, "has no argument 'vector'"),
    ],
)
def test_a_fit_that_cannot_be_made_is_refused(named: dict[str, Any], message: str, made: Any) -> None:
    store, _ = made
    with pytest.raises(AnalysisError, match=message):
        replay.Steer.fit_store(store, **{"target": "label", "layers": 2, **named})
