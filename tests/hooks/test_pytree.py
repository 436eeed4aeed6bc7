from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.pytree import find_input_tensor, find_tensor

A, B, C = torch.zeros(2), torch.ones(3), torch.full((4,), 2.0)
Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("tree", "index", "leaf"),
    [
        (A, 0, A),
        ((A, None, B), 0, A),
        ((A, None, B), 1, B),
        ([3, {"x": B, "y": [C]}], 1, C),
        (Pair(None, (A, B)), 1, B),
        (BaseModelOutputWithPast(last_hidden_state=A, hidden_states=(B, C)), 2, C),
        ({"z": B, "a": C}, 0, B),
    ],
)
def test_tensors_are_counted_in_the_order_of_the_pytree(tree: object, index: int, leaf: torch.Tensor) -> None:
    found, rebuild = find_tensor(tree, index, "here")
    assert found is leaf
    new = torch.full((5,), 7.0)
    rebuilt = rebuild(new)
    assert type(rebuilt) is (torch.Tensor if tree is A else type(tree))
    assert find_tensor(rebuilt, index, "here")[0] is new
    others = list(range(index))
    assert all(find_tensor(rebuilt, n, "")[0] is find_tensor(tree, n, "")[0] for n in others)
    assert found is leaf, "the tree itself is not changed"


@pytest.mark.parametrize(("tree", "index"), [((A, B), 2), ((A, B), -1), (None, 0), ({"n": 3}, 0), (object(), 0)])
def test_a_missing_tensor_raises(tree: object, index: int) -> None:
    with pytest.raises(HookError, match=r"(?s)where: here.*found: \d tensors in a"):
        find_tensor(tree, index, "here")


def test_inputs_are_positional_ones_then_keywords() -> None:
    args, kwargs = (None, A), {"mask": None, "x": B, "y": (C,)}
    for index, leaf in enumerate((A, B, C)):
        found, rebuild = find_input_tensor(args, kwargs, index, "here")
        assert found is leaf
        new = torch.ones(1)
        rebuilt_args, rebuilt_kwargs = rebuild(new)
        assert find_input_tensor(rebuilt_args, rebuilt_kwargs, index, "")[0] is new
        assert list(rebuilt_kwargs) == ["mask", "x", "y"]
    leaf, rebuild = find_input_tensor((A, 1), {"k": 2}, 0, "here")
    assert leaf is A
    assert rebuild(B) == ((B, 1), {"k": 2})
