from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flexcache.errors import HookError
from flexcache.hooks import FlexModel, HookFunction
from flexcache.hooks.flexmodel.edits import Add, BatchMean, Compose, Edit, Mean, ProjectOut, Scale, SwapRows, Zero
from tests.models import HIDDEN, tiny, token_ids


def apply(edit: Any, x: torch.Tensor) -> torch.Tensor:
    return edit(nn.Identity(), x, SimpleNamespace(), nn.ModuleDict())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


VECTOR = torch.linspace(-1, 2, 8, dtype=torch.float64)
DIRECTIONS = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EDITS = {
    "zero": Zero(),
    "neurons": Zero([1, -1]),
    "mean": Mean(VECTOR),
    "batch mean": BatchMean(),
    "scale": Scale(-0.5),
    "add": Add(VECTOR, alpha=3.0),
    "project": ProjectOut(DIRECTIONS),
    "swap": SwapRows([2, 0, 1]),
    "composed": Compose(Scale(2.0), Add(VECTOR)),
}


def expected(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "neurons":
        y = x.clone()
        y[..., [1, 7]] = 0
        return y
    if name == "project":
        d = DIRECTIONS.numpy()
        p = d.T @ torch.linalg.inv(DIRECTIONS @ DIRECTIONS.T).numpy() @ d
        return x - x @ torch.from_numpy(p)
    return {
        "zero": torch.zeros_like(x),
        "mean": VECTOR.expand_as(x),
        "batch mean": x.mean(dim=(0, 1)).expand_as(x),
        "scale": -0.5 * x,
        "add": x + 3 * VECTOR,
        "swap": torch.stack([x[2], x[0], x[1]]),
        "composed": 2 * x + VECTOR,
    }[name]


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_equals_its_formula_and_does_not_modify_its_input(name: str, x: torch.Tensor) -> None:
    before = x.clone()
    torch.testing.assert_close(apply(EDITS[name], x), expected(name, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("positions", [-1, [0, 3], slice(1, None, 2)])
def test_positions_choose_tokens(positions: Any, x: torch.Tensor) -> None:
    y = apply(Scale(-3.0, positions=positions), x)
    chosen = torch.zeros(5, dtype=torch.bool)
    chosen[positions] = True
    assert torch.equal(y[:, chosen], -3 * x[:, chosen])
    assert torch.equal(y[:, ~chosen], x[:, ~chosen])


@pytest.mark.parametrize("name", EDITS)
def test_gradients_flow_through(name: str, x: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(lambda x: apply(EDITS[name], x), x.clone().requires_grad_())


@pytest.mark.parametrize("positions", [1, slice(0, 3, 2), [4, 0, 4, -1]])
def test_gradients_flow_through_chosen_tokens_once_each(positions: Any, x: torch.Tensor) -> None:
    edit = ProjectOut(DIRECTIONS, positions=positions)
    assert torch.autograd.gradcheck(lambda x: apply(edit, x), x.clone().requires_grad_())


def test_a_steering_vector_can_be_trained(x: torch.Tensor) -> None:
    vector = VECTOR.clone().requires_grad_()
    apply(Add(vector, alpha=2.0), x).sum().backward()
    assert torch.equal(vector.grad, torch.full((8,), 2.0 * 15, dtype=torch.float64))


def test_half_precision_is_kept_and_projections_are_computed_in_float32(x: torch.Tensor) -> None:
    half = (1000 * x).bfloat16()
    for edit in EDITS.values():
        assert apply(edit, half).dtype == torch.bfloat16
    left = apply(ProjectOut(DIRECTIONS), half).double() @ DIRECTIONS.T
    assert left.abs().max() < 2e-2 * half.double().abs().max()


def test_directions_may_repeat(x: torch.Tensor) -> None:
    twice = torch.cat([DIRECTIONS, 2 * DIRECTIONS])
    torch.testing.assert_close(apply(ProjectOut(twice), x), apply(ProjectOut(DIRECTIONS), x))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Zero([8]), "features from 0 to 7"),
        (Mean(torch.ones(7)), "a vector of 8 features"),
        (Add(torch.ones(8, 1)), "a vector of 8 features"),
        (ProjectOut(torch.ones(2, 7)), "directions of 8 features"),
        (SwapRows([0, 0, 1]), "an order of the 3 rows"),
        (Scale(2.0, positions=5), "positions from -5 to 4"),
        (Edit(), "does not define an edit"),
    ],
)
def test_an_edit_that_does_not_fit_the_activation_raises_an_error(edit: Edit, message: str, x: torch.Tensor) -> None:
    with pytest.raises(HookError, match=message) as error:
        apply(edit, x)
    assert error.value.remedy
    with pytest.raises(HookError, match="rows, tokens"):
        apply(Zero(positions=0), x[0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Zero(3), "dims to be a list"),
        (lambda: Zero(positions="last"), "positions to be a list"),
        (lambda: Scale(2.0, positions=[0.5]), "positions to be a list"),
        (lambda: Scale("half"), "factor to be a number"),
        (lambda: Add([1.0, 2.0]), "vector to be a tensor of floating-point numbers"),
        (lambda: Add(VECTOR, alpha="1"), "alpha to be a number"),
        (lambda: Mean(torch.arange(8)), "a tensor of torch.int64"),
        (lambda: Mean(), r"BatchMean\(\)"),
        (lambda: ProjectOut([[1.0]]), "directions to be a tensor"),
        (lambda: SwapRows([1.0, 0.0]), "order to be a list"),
        (lambda: Compose(Scale(2.0), 3), "editing functions"),
    ],
)
def test_invalid_settings_raise_an_error_when_the_edit_is_made(make: Any, message: str) -> None:
    with pytest.raises(HookError, match=message) as error:
        make()
    assert error.value.where
    assert error.value.remedy


def test_edits_are_equal_if_they_hold_the_same_tensors() -> None:
    assert Add(VECTOR) == Add(VECTOR)
    assert Add(VECTOR) != Add(VECTOR.clone())
    assert Add(VECTOR) != Add(VECTOR, alpha=2.0)
    assert Mean(VECTOR) != Add(VECTOR)
    assert len({Zero([1]), Zero([1]), Zero([2]), Compose(Zero([1])), Compose(Zero([1]))}) == 3


def test_an_edit_prints_what_it_is() -> None:
    assert str(Scale(0.5, positions=-1)) == "Scale(positions=-1, factor=0.5)"
    assert str(Add(VECTOR)) == "Add(positions=None, vector=(8), alpha=1.0)"
    assert str(Compose(ProjectOut(DIRECTIONS))) == "Compose(edits=(ProjectOut(positions=None, directions=(2, 8)),))"


def test_an_edit_in_a_model_equals_a_plain_hook() -> None:
    vector = torch.randn(HIDDEN)
    edit = Compose(Add(vector, positions=-1), SwapRows([1, 2, 0]))
    model = tiny("llama")

    def by_hand(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        steered = output.clone()
        steered[:, -1] += vector
        return torch.stack([steered[1], steered[2], steered[0]])

    handle = model.model.layers[1].register_forward_hook(by_hand)
    expected = model(input_ids=token_ids()).logits
    handle.remove()
    flex = FlexModel(model, {})
    flex.register_forward_hook(HookFunction("model.layers.1", editing_function=edit))
    assert torch.equal(flex(input_ids=token_ids()).logits, expected)
