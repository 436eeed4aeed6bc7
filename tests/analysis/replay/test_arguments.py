from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from analysis import replay
from analysis.replay.edits.edit import Edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.sweeps.grid import has_readout, has_tokens
from flexcache.errors import AnalysisError, FlexCacheError, StoreError
from tests.analysis.replay.conftest import swept
from tests.corpora import token_documents
from tests.models import HIDDEN, VOCABULARY

DOCUMENTS = token_documents([6] * 9, vocabulary=VOCABULARY)
IDS = [document["id"] for document in DOCUMENTS]
ONE = np.ones(HIDDEN)


@pytest.fixture
def made(captured: Callable[..., Any]) -> tuple[Any, Any]:
    return captured(documents=DOCUMENTS, batch_tokens=30)


@dataclass(frozen=True, eq=False, repr=False)
class Broken(Edit):
    """An edit that fails in its own code."""

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Raise KeyError."""
        raise KeyError("a bug of mine")


@dataclass(frozen=True, eq=False, repr=False)
class Returns(Edit):
    """An edit that returns the mean of the tokens, or None."""

    nothing: bool = False

    def change(self, x: torch.Tensor, context: EditContext) -> Any:
        """Return another shape than *x*."""
        return None if self.nothing else x.mean(0)


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"edit": replay.Patch("doc-11")}, "doc-1"),
        ({"edit": replay.Patch({"doc-0": "zz"})}, "there are"),
        ({"edit": replay.Patch({"zz": "doc-0"})}, "there are"),
        ({"edit": replay.Zero() >> replay.Interpolate("zz")}, "there are"),
        ({"edit": replay.ByLayer({1: replay.Patch("zz")})}, "there are"),
        ({"edit": replay.NormMatched(replay.Interchange("zz", directions=ONE))}, "there are"),
        ({"answers": {"zz": (5, 6)}}, "there are"),
        ({"at": replay.grid(positions={"subject": {"zz": [1]}})}, "there are"),
        ({"documents": ["dok-1"]}, "did you mean doc-1"),
    ],
)
def test_an_unknown_document_raises_an_error_with_the_nearest_ids(options: Any, near: str, made: Any) -> None:
    with pytest.raises((AnalysisError, StoreError), match="the store has no document") as error:
        swept(made, **options)
    assert near in str(error.value.remedy)


def test_a_position_that_no_document_has_gives_an_error_or_a_note(made: Any) -> None:
    for positions in (99, [6, -7], {"subject": {"doc-1": [6]}}):
        with pytest.raises(AnalysisError, match="no document has a token") as error:
            swept(made, at=replay.grid(layers=1, positions=positions))
        assert "6 tokens" in str(error.value.expected)
    found = swept(made, at=replay.grid(layers=1, positions=["last", 99]))
    assert [note for note in found.attrs["notes"] if "NaN" in note] == [found.attrs["notes"][-1]]
    assert "position 99" in found.attrs["notes"][-1]
    unpaired = swept(made, edit=replay.Patch({"doc-0": "doc-1"}) | replay.Zero(), documents=["doc-4"])
    assert "Patch" in unpaired.attrs["notes"][-1]
    assert "Zero" not in unpaired.attrs["notes"][-1]
    assert not swept(made).attrs["notes"]


@pytest.mark.parametrize(
    "answers",
    [
        (5, -1),
        (5, VOCABULARY),
        (5, 6, 7),
        (5,),
        (),
        5,
        5000,
        5.0,
        "ab",
        ("a", "b"),
        (True, False),
        (5, 6.5),
        torch.tensor([5.0, 6.0]),
        torch.tensor(5),
        {"doc-0": (5, -1)},
        {"doc-0": 5},
        {"doc-0": None},
        [(5, 6)] * 8 + [(5, 6, 7)],
        [(5, 6)] * 8 + [7],
    ],
)
def test_answers_are_pairs_of_token_ids(answers: Any, made: Any) -> None:
    with pytest.raises(AnalysisError, match="answers cannot be read") as error:
        swept(made, metrics=["prob"], answers=answers)
    assert str(VOCABULARY - 1) in str(error.value.expected)


def test_the_first_token_of_the_vocabulary_may_be_an_answer(made: Any) -> None:
    one, other = (swept(made, metrics=["logit_diff"], answers=pair)["value"] for pair in ((0, 5), (5, 0)))
    np.testing.assert_allclose(one, -other, atol=1e-6)
    assert np.isfinite(one.sel(arm="edit")).all()


def test_answers_may_be_a_pair_for_each_document_in_order(made: Any) -> None:
    pairs = [(n, n + 20) for n in range(9)]
    by_id = dict(zip(IDS, pairs))
    expected = swept(made, metrics=["logit_diff"], answers=by_id)["value"]
    for given in (pairs, [list(pair) for pair in pairs], np.array(pairs), torch.tensor(pairs)):
        assert swept(made, metrics=["logit_diff"], answers=given)["value"].equals(expected)
    some = [IDS[4], IDS[1]]
    found = swept(made, metrics=["logit_diff"], answers=[by_id[name] for name in some], documents=some)["value"]
    assert found.equals(expected.sel(document=[IDS[1], IDS[4]]))
    one = swept(made, metrics=["logit_diff"], answers=(3, 4))["value"]
    assert swept(made, metrics=["logit_diff"], answers=torch.tensor([3, 4]))["value"].equals(one)
    with pytest.raises(AnalysisError, match="do not fit the documents") as error:
        swept(made, metrics=["logit_diff"], answers=pairs[:3])
    assert "9 documents" in str(error.value.expected)
    with pytest.raises(AnalysisError, match="no document of the sweep has answers"):
        swept(made, metrics=["logit_diff"], answers={IDS[0]: (1, 2)}, documents=[IDS[1]])


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_an_exception_in_an_edit_names_the_edit(site: str, made: Any) -> None:
    def wrong(module: Any, activation: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
        return activation @ torch.ones(3)

    at = replay.grid(site, layers=1 if site == "resid_post" else 0)
    for edit, name, kind in (
        (Broken(), "Broken", KeyError),
        (replay.Zero() >> Broken(), "Broken", KeyError),
        (replay.Function(wrong), "Function", RuntimeError),
    ):
        with pytest.raises(AnalysisError, match=f"the edit {name} failed") as error:
            swept(made, at=at, edit=edit)
        assert isinstance(error.value.__cause__, kind)
        assert kind.__name__ in str(error.value.found)
        assert "replayed" not in str(error.value)
    for edit in (Returns(), Returns(nothing=True)):
        with pytest.raises(AnalysisError, match="another shape"):
            swept(made, at=at, edit=edit)


def test_an_error_names_the_metric_that_fails_or_returns_no_number(made: Any) -> None:
    def broken(outcome: Any) -> float:
        return {}["nothing"]  # type: ignore[no-any-return]

    with pytest.raises(AnalysisError, match="metric broken failed") as error:
        swept(made, metrics=[broken])
    assert isinstance(error.value.__cause__, KeyError)
    for value in (torch.ones(2), np.ones((1, 1)), [1.0, 2.0], None, "much", 1j):

        def vector(outcome: Any, value: Any = value) -> Any:
            return value

        with pytest.raises(AnalysisError, match="metric vector returned something other than a number"):
            swept(made, metrics=[vector])
    for value in (torch.tensor(2.0), np.float32(2), 2):

        def number(outcome: Any, value: Any = value) -> Any:
            return value

        assert (swept(made, metrics=number)["value"].sel(arm="edit") == 2).all()
    for metrics in (None, 5, [None]):
        with pytest.raises(AnalysisError, match="this is not a metric"):
            swept(made, metrics=metrics)


def test_store_and_model_are_checked_first(made: Any) -> None:
    store, model = made
    for wrong in ("gpt2", None, 5, type(model), lambda: "gpt2"):
        with pytest.raises(AnalysisError, match="needs a loaded model"):
            swept((store, wrong))
    with pytest.raises(AnalysisError, match="needs a loaded model"):
        replay.Engine(store, "gpt2")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="swapped"):
        swept((model, store))
    with pytest.raises(AnalysisError, match="swapped"):
        replay.identity_error(model, store)
    with pytest.raises(AnalysisError, match="needs a store"):
        swept((None, model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 1}, r"layers=1\)"),
        ({"at": 0}, r"layers=0\)"),
        ({"at": "mlp_out"}, r"grid\('mlp_out'\)"),
        ({"at": {"layers": 1}}, "replay.grid"),
        ({"edit": replay.Zero}, r"Zero\(\) with brackets"),
        ({"edit": [replay.Zero(), replay.Mean]}, r"Mean\(\) with brackets"),
        ({"edit": lambda x: x}, "replay.Function"),
        ({"edit": None}, "not an edit"),
        ({"edit": "zero"}, "not an edit"),
        ({"edit": {"zero": {}}}, "not an edit"),
        ({"readout": 1.5}, "whole number"),
        ({"readout": None}, "whole number"),
    ],
)
def test_grid_and_edits_are_checked_before_any_forward(options: Any, message: str, made: Any) -> None:
    with pytest.raises(AnalysisError, match=message):
        swept(made, **options)


@pytest.mark.parametrize(
    "positions", [None, 1.5, "middle", True, [1, None], [], {}, {"x": [1]}, {"x": {"doc-1": [1.5]}}]
)
def test_invalid_positions_raise_an_error(positions: Any) -> None:
    with pytest.raises(AnalysisError, match="position"):
        replay.grid(positions=positions)
    assert replay.grid(positions=np.int64(3)).positions == {"3": 3}
    assert replay.grid(positions=np.arange(2)).positions == {"0": 0, "1": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: replay.Patch(["1", "2"]),
        lambda: replay.Patch(["ab", "cd"]),
        lambda: replay.Patch(None),  # type: ignore[arg-type]
        lambda: replay.Patch(5),  # type: ignore[arg-type]
        lambda: replay.Patch({}),
        lambda: replay.Patch("a", align=None),  # type: ignore[arg-type]
        lambda: replay.Patch("a", align={0: 1.5}),  # type: ignore[dict-item]
        lambda: replay.Clamp(1, -1),
        lambda: replay.Clamp("low"),  # type: ignore[arg-type]
        lambda: replay.Clamp(float("nan")),
        lambda: replay.Clamp([1.0, 2.0]),  # type: ignore[arg-type]
        lambda: replay.Steer(ONE, alpha=[]),
        lambda: replay.Steer(ONE, alpha=["a"]),  # type: ignore[list-item]
        lambda: replay.Steer(ONE, alpha=float("inf")),
        lambda: replay.Steer([[1.0], [1.0, 2.0]]),  # type: ignore[arg-type]
        lambda: replay.Zero(()),
        lambda: replay.Zero(1.5),  # type: ignore[arg-type]
        lambda: replay.Zero(None) >> replay.Zero,  # type: ignore[operator]
        lambda: replay.Zero() | replay.Zero,  # type: ignore[operator]
        lambda: replay.NormMatched(replay.Zero),  # type: ignore[arg-type]
        lambda: replay.ByLayer({}),
        lambda: replay.ByLayer({0: replay.Zero}),
        lambda: replay.ByLayer(5),
        lambda: replay.Function(None),  # type: ignore[arg-type]
    ],
)
def test_invalid_settings_of_edits_raise_an_error_when_the_edit_is_made(make: Callable[[], Any]) -> None:
    with pytest.raises(AnalysisError) as error:
        make()
    assert isinstance(error.value, FlexCacheError)
    assert error.value.expected


def test_numpy_numbers_are_accepted_as_strengths_and_features() -> None:
    assert replay.Scale(np.float32(2)).strengths == (2.0,)
    assert replay.Scale(torch.tensor([1.0, 2.0])).strengths == (1.0, 2.0)  # type: ignore[arg-type]
    assert replay.Zero(np.arange(2)).dims == (0, 1)  # type: ignore[arg-type]


def test_an_unknown_keyword_is_an_error_with_the_nearest_of_all_arguments(captured: Callable[..., Any]) -> None:
    store, model = captured()
    for wrong, right in {"sed": "seed", "copis": "copies"}.items():
        with pytest.raises(AnalysisError, match=f"no argument '{wrong}'") as error:
            replay.sweep(store, model, replay.grid(), replay.Zero(), **{wrong: 1})
        assert f"did you mean {right}" in str(error.value.remedy)


def test_heads_are_each_or_different_whole_numbers() -> None:
    for given, parsed in (("each", "each"), (None, None), (0, (0,)), ([2, 0], (2, 0))):
        assert replay.grid("z", heads=given).heads == parsed
    for wrong in ([], [1, 1], [-1], [0.5], "all", [True]):
        with pytest.raises(AnalysisError, match="heads cannot be read"):
            replay.grid("z", heads=wrong)


def test_positions_have_tokens_where_a_document_is_long_enough() -> None:
    lengths = {"a": 3, "b": 1}
    for positions, there in (
        *(({"a": [p]}, -3 <= p < 3) for p in range(-5, 5)),
        *((p, -3 <= p < 3) for p in range(-5, 5)),
        ({"c": [0]}, False),
        ({"b": [-2], "a": [2]}, True),
        ("last", True),
    ):
        assert has_tokens(positions, lengths) is there, positions  # type: ignore[arg-type]
    assert has_readout("last", np.array([0, 2])).tolist() == [False, True]


def test_all_layers_are_those_at_which_a_replay_can_start(captured: Any) -> None:
    """The block after a stored residual stream can run first; the stream itself needs no block before it."""
    store, _ = captured(sites={"resid_post": [0]})
    assert replay.grid("resid_post").resolve(store, 3)[0] == (0,)
    assert replay.grid("mlp_out").resolve(store, 3)[0] == (0, 1)
