from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flexcache.identity.weights import combine_digests, digest_tensors
from tests.models import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]


def weights(model: nn.Module) -> str:
    return combine_digests(digest_tensors(model).weights)


class Holder(nn.Module):
    """A module with tensors of any kind, as a parameter, as buffers and as a plain attribute."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("saved", value.clone())
        self.register_buffer("computed", value.clone(), persistent=False)
        self.plain = value.clone()
        self.held = nn.Parameter(torch.ones(2, 3))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_change_of_any_bit_of_any_tensor_changes_the_digest(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    value = (torch.rand(shape) * 2).to(dtype)
    model = Holder(value)
    before = digest_tensors(model)
    assert digest_tensors(copy.deepcopy(model)) == before
    name = data.draw(st.sampled_from(["saved", "computed", "plain"]))
    raw = getattr(model, name).reshape(-1).view(torch.uint8)
    at, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 0 if dtype == torch.bool else 7))
    raw[at] ^= 1 << bit
    after = digest_tensors(model)
    changed = {key for kind in ("weights", "computed") for key, text in vars(after)[kind].items()
               if vars(before)[kind][key] != text}  # fmt: skip
    assert changed == {name}


def test_names_and_shapes_change_the_digest() -> None:
    digests = {weights(nn.Linear(4, 4, bias=False).requires_grad_(False))}
    model = nn.Linear(4, 4, bias=False)
    for make in (lambda w: w, lambda w: w.reshape(2, 8), lambda w: w.double(), lambda w: w.T.contiguous()):
        model.weight = nn.Parameter(make(model.weight.data))
        digests.add(weights(model))
    assert len(digests) == 5
    a, b = nn.Module(), nn.Module()
    a.first, b.second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    assert weights(a) != weights(b)


def test_strides_and_wrappers_do_not_change_the_digest() -> None:
    model = tiny("llama")
    before = weights(model)
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.data.T.contiguous().T)
    assert not model.lm_head.weight.is_contiguous()
    assert weights(model) == before
    assert weights(nn.DataParallel(model)) == before
    assert weights(torch.compile(model, backend="aot_eager")) == before


def test_weights_offloaded_by_accelerate_are_digested(tmp_path: Path) -> None:
    """On the meta device there is nothing to read; accelerate has the values in memory, or in files."""
    before = weights(tiny("llama"))
    where: dict[str, Any] = {"execution_device": torch.device("cpu")}

    def edited() -> nn.Module:
        model = tiny("llama")
        model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
        return model

    for number, (make, same) in enumerate([(lambda: tiny("llama"), True), (edited, False)]):
        assert (weights(accelerate.disk_offload(make(), tmp_path / str(number), **where)) == before) is same
        assert (weights(accelerate.cpu_offload(make(), **where)) == before) is same


@pytest.mark.filterwarnings("ignore")
def test_a_wrapper_subclass_is_digested_by_its_inner_tensors() -> None:
    """Quantized weights of torchao are tensors whose values are other tensors."""
    model = nn.Module()
    model.weight = nn.Parameter(TwoParts(torch.arange(6.0), torch.tensor([0.5])), requires_grad=False)
    before = digest_tensors(model).weights
    model.weight.scale[0] = 0.25
    assert digest_tensors(model).weights != before


class TwoParts(torch.Tensor):
    """A tensor of values and a scale, which holds no data of its own."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> TwoParts:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(f"the values of a packed tensor were read by {function}")
