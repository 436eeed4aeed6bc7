"""Tokens that metrics read, sums and means over them, and notes on values that say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from analysis import replay
from analysis.replay.sweeps.grid import has_readout, readout_positions
from flexcache.errors import AnalysisError
from tests.analysis.replay.conftest import swept
from tests.corpora import token_documents
from tests.models import DEPTH, HIDDEN, VOCABULARY

DOCUMENTS = token_documents([5, 9, 7], vocabulary=VOCABULARY)
IDS = [document["id"] for document in DOCUMENTS]
EQUAL = token_documents([6] * 4, vocabulary=VOCABULARY)


@pytest.fixture
def made(captured: Callable[..., Any]) -> tuple[Any, Any]:
    return captured(documents=DOCUMENTS, batch_tokens=30)


def divergences(model: Any, document: dict[str, Any], position: int) -> np.ndarray:
    """Return KL at each token in plain forwards, after the output of block 1 is zeroed at a position."""

    def zero(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        edited = output.clone()
        edited[:, position] = 0
        return edited

    ids = torch.tensor([document["tokens"]])
    with torch.no_grad():
        before = model(ids).logits[0].double().numpy()
        handle = model.model.layers[1].register_forward_hook(zero)
        after = model(ids).logits[0].double().numpy()
        handle.remove()
    p, q = log_softmax(before, -1), log_softmax(after, -1)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def test_a_document_without_a_readout_token_has_no_value_and_is_counted(made: Any) -> None:
    found = swept(made, readout=[8])
    value = found["value"].squeeze().sel(arm="edit")
    assert np.isnan(value.sel(document=[IDS[0], IDS[2]])).all()
    expected = divergences(made[1], DOCUMENTS[1], -1)[8]
    assert float(value.sel(document=IDS[1])) == pytest.approx(expected, abs=1e-5)
    assert found.attrs["notes"][0] == "2 of 3 documents lack a token of the readout (8): their values are NaN."
    several = swept(made, at=replay.grid(layers=1, positions=0), readout=[0, -9])
    assert np.isfinite(several["value"].sel(document=IDS[1])).all()
    assert np.isnan(several["value"].sel(document=IDS[0])).all()
    assert replay.Sweep(found).effect()["documents"].sel(arm="edit").values.tolist() == [[[[[1]]]]]
    assert "2 of 3 documents lack" in repr(replay.Sweep(found))
    for readout in (41, [0, 41], [-10], []):
        with pytest.raises(AnalysisError, match="readout"):
            swept(made, readout=readout)


def test_readout_tokens_are_read_once_in_the_order_of_the_document(made: Any) -> None:
    answers: dict[str, Any] = {"answers": (3, 4), "metrics": ["kl_sum", "logit_diff"], "documents": [IDS[1]]}
    last = swept(made, readout="last", **answers)["value"]
    np.testing.assert_allclose(swept(made, readout=[8, -1], **answers)["value"], last, atol=1e-5)
    pair = swept(made, readout=[0, 8], **answers)["value"]
    assert swept(made, readout=[-1, 0], **answers)["value"].equals(pair)
    of_last = [values.sel(metric="logit_diff") for values in (pair, last)]
    np.testing.assert_allclose(of_last[0], of_last[1], atol=1e-5)


def test_sums_and_means_over_tokens_are_named_apart(made: Any) -> None:
    names = ["kl", "kl_mean", "kl_sum", "flips_sum", "flips_mean", "loss", "loss_sum", "loss_mean"]
    found = swept(made, at=replay.grid(layers=1, positions=[1, "last"]), metrics=names)
    value = found["value"].sel(arm="edit", layer=1).squeeze()
    for document in DOCUMENTS:
        length = len(document["tokens"])
        for label, position in (("1", 1), ("last", -1)):
            at = value.sel(document=document["id"], position=label)
            each = divergences(made[1], document, position)
            assert float(at.sel(metric="kl_sum")) == pytest.approx(each.sum(), rel=1e-4)
            assert float(at.sel(metric="kl_mean")) == pytest.approx(each.mean(), rel=1e-4)
            assert float(at.sel(metric="kl")) == float(at.sel(metric="kl_mean"))
            assert float(at.sel(metric="flips_sum")) == round(length * float(at.sel(metric="flips_mean")))
            assert float(at.sel(metric="loss_sum")) == pytest.approx((length - 1) * float(at.sel(metric="loss_mean")))
    last = swept(made, readout="last")["value"].squeeze().sel(arm="edit")
    np.testing.assert_allclose(value.sel(metric="kl_sum", position="last"), last, rtol=1e-5)
    unnamed = [note for note in found.attrs["notes"] if note.startswith("Means")]
    assert unnamed == [
        "Means over all tokens of a document, which depend on its length: kl. Independent of it:"
        ' readout "last", kl_sum.'
    ]
    assert swept(made, documents=IDS[:2]).attrs["notes"][0].startswith("Means"), "two lengths"
    for options in ({"metrics": ["kl_sum", "kl_mean"]}, {"readout": "last"}, {"documents": IDS[:1]}):
        assert not [note for note in swept(made, **options).attrs["notes"] if note.startswith("Means")]


def unchanged(results: Any) -> list[str]:
    return [note.partition(" by edits")[0] for note in results.attrs["notes"] if "did not change" in note]


@pytest.mark.parametrize("copies", [1, 3])
def test_a_metric_that_an_edit_cannot_reach_is_noted(copies: int, captured: Callable[..., Any]) -> None:
    made = captured(documents=EQUAL, batch_tokens=30)
    last = swept(made, metrics=["kl", "loss"], copies=copies)
    assert unchanged(last) == ["loss did not change in any document"]
    assert last.attrs["notes"][0].endswith("by edits at position last: none reaches what it reads.")
    assert not unchanged(swept(made, at=replay.grid(layers=1, positions=[0, "all"]), metrics=["kl", "loss"]))
    before = swept(made, at=replay.grid(layers=1, positions=[1, 4]), readout=[2], copies=copies)
    assert "at position 4:" in before.attrs["notes"][0]
    assert float(before["value"].sel(arm="edit", position="4").max()) < 1e-10
    ends = swept(
        made,
        at=replay.grid(layers=[2, DEPTH - 1], positions=[0, 1, "last"]),
        metrics=["kl", "rank"],
        answers=(3, 4),
        readout="last",
        copies=copies,
    )
    assert f"at position 0, 1 of layer {DEPTH - 1}:" in ends.attrs["notes"][0]
    assert len(unchanged(ends)) == 1
    assert replay.projection("late", np.ones(HIDDEN)).reads == (("resid_post", -1),)
    later = replay.projection("early", np.ones(HIDDEN), layer=0)
    assert unchanged(swept(made, metrics=[later], copies=copies)) == ["early did not change in any document"]
    small = swept(made, edit=replay.Scale(1 + 1e-6), metrics=["flips", "kl"], at=replay.grid(layers=[0, 1]))
    assert not [note for note in unchanged(small) if "kl" in note]


def test_small_changes_are_seen_although_the_store_is_rounded(captured: Callable[..., Any]) -> None:
    made = captured(documents=EQUAL, batch_tokens=30, dtype="bfloat16")
    found = swept(made, edit=replay.Scale(1.001), metrics=["loss", "kl"], at=replay.grid(layers=1, positions=0))
    assert float(found["identity_error"].max()) > 1e-4
    assert not unchanged(found)


@pytest.mark.parametrize(
    ("readout", "has", "positions"),
    [
        ((5,), [False, True], [4, 5]),
        ((0,), [True, True], [0, 0]),
        ((4,), [True, True], [4, 4]),
        ((-5,), [True, True], [0, 1]),
        ((-6,), [False, True], [0, 0]),
        ("last", [True, True], [4, 5]),
    ],
)
def test_readout_positions_at_the_ends_of_documents(readout: Any, has: list[bool], positions: list[int]) -> None:
    lengths = np.array([5, 6])
    assert has_readout(readout, lengths).tolist() == has
    found = readout_positions(readout, lengths)
    assert found is not None
    assert found[:, 0].tolist() == positions


def test_the_loss_of_a_model_that_reads_both_ways_changes_with_the_last_token(captured: Callable[..., Any]) -> None:
    assert not unchanged(swept(captured("bert", documents=EQUAL, batch_tokens=30), metrics=["loss"]))


def test_a_metric_without_a_value_is_noted(made: Any) -> None:
    found = swept(made, metrics=["kl", "loss"], readout="last")
    assert np.isnan(found["value"].sel(metric="loss")).all()
    assert "loss has no value in any document." in found.attrs["notes"]
    nothing = swept(made, edit=replay.Patch({IDS[0]: IDS[1]}), documents=[IDS[2]])
    assert len(nothing.attrs["notes"]) == 1, "every value is missing"


def test_a_document_is_not_its_own_donor(made: Any) -> None:
    for donor in (IDS[1], {IDS[1]: IDS[1], IDS[0]: IDS[1]}):
        value = swept(made, at=replay.grid(layers=1, positions=0), edit=replay.Patch(donor))["value"].sel(arm="edit")
        assert np.isnan(value.sel(document=IDS[1])).all()
        assert (value.sel(document=IDS[0]) > 0).all()
    shifted = swept(made, at=replay.grid(layers=1, positions=0), edit=replay.Patch(IDS[1], align={0: 3}))["value"]
    assert (shifted.sel(arm="edit", document=IDS[1]) > 0).all(), "another token of the same document"


def test_an_eraser_is_not_fitted_to_missing_values() -> None:
    X = np.random.default_rng(0).standard_normal((4, 3))
    for y in ([1.0, 0.0, float("nan"), 1.0], np.array(["a", None, "b", "a"], object)):
        with pytest.raises(AnalysisError, match="a value for each sample"):
            replay.Erase.fit(X, y)  # type: ignore[arg-type]
