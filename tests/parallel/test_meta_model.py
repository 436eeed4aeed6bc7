from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexcache.parallel.meta_model import BatchExtent, DimSize, MetaModel, ShapeProbe, batch_extent, shape_rule
from tests.distributed.reference import first
from tests.models import tiny, token_ids

FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3", "mixtral", "phi3", "falcon", "opt", "bloom", "bert"]


def output(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> torch.Tensor | None:
    return first(out)


def real_shapes(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name, _ in model.named_modules()}

    def hook(name: str) -> Callable[..., None]:
        return lambda m, a, o: found[name].append(tuple(x.shape) if (x := first(o)) is not None else ())

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_model_learns_the_shapes_of_every_batch(family: str) -> None:
    model = tiny(family)
    names = [name for name, _ in model.named_modules() if "experts." not in name]
    probes = [ShapeProbe(name, model.get_submodule(name), output) for name in names]
    ids = token_ids(2, 7)
    learned = MetaModel(model).learn_shapes(probes, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for extent in (BatchExtent(2, 7), BatchExtent(3, 5), BatchExtent(1, 11)):
        assert learned.covers(extent)
        real = real_shapes(model, lambda extent=extent: model(input_ids=token_ids(*extent)))
        for name in names:
            found = [tuple(size.of(extent) for size in shape) for shape in learned.shapes[name]]
            assert found == real[name], name


def test_the_meta_model_uses_no_memory_and_leaves_the_model_unchanged() -> None:
    model = tiny("mixtral")
    fired = []
    model.model.layers[0].register_forward_hook(lambda m, a, o: fired.append(1))
    config, state = dict(vars(model.config)), {k: v.clone() for k, v in model.state_dict().items()}
    meta_model = MetaModel(model)
    meta_model.learn_shapes([ShapeProbe(0, model.lm_head, output)], (), {"input_ids": token_ids()})
    assert all(p.device.type == "meta" for p in meta_model._root.parameters())
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint({id(p) for p in meta_model._root.parameters()})
    assert not fired
    assert vars(model.config) == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in meta_model._root.modules())


def test_matrices_of_features_have_rows_and_no_length() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))
    learned = MetaModel(model).learn_shapes(
        [ShapeProbe(n, model[n], output) for n in range(3)], (torch.randn(4, 10),), {}
    )
    assert learned.covers(BatchExtent(9, 1))
    assert learned.shapes[1] == [(DimSize(1, 1, 0), DimSize(20, 0, 0))]


def test_tensors_that_the_module_creates_are_on_meta_too() -> None:
    class Positions(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[1])[None, :, None]

    model = Positions()
    learned = MetaModel(model).learn_shapes([ShapeProbe(0, model, output)], (torch.randn(2, 3, 4),), {})
    assert learned.shapes[0] == [(DimSize(1, 1, 0), DimSize(1, 0, 1), DimSize(4, 0, 0))]


def test_shapes_of_a_model_of_fixed_length_cover_no_other_length() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(3 * 4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.f(x.flatten(1))

    model = Fixed()
    learned = MetaModel(model).learn_shapes([ShapeProbe(0, model.f, output)], (torch.randn(2, 3, 4),), {})
    assert learned.shapes[0] == [(DimSize(1, 1, 0), DimSize(5, 0, 0))]
    assert learned.covers(BatchExtent(7, 3))
    assert not learned.covers(BatchExtent(2, 4))


def test_a_shape_without_a_rule_does_not_hide_others() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.g(x).sum() + self.f(x[:, : x.shape[1] // 2 + 1]).sum()

    model = Pairs()
    probes = [ShapeProbe("f", model.f, output), ShapeProbe("g", model.g, output)]
    learned = MetaModel(model).learn_shapes(probes, (torch.randn(2, 8, 4),), {})
    assert learned.shapes == {"f": [], "g": [(DimSize(1, 1, 0), DimSize(1, 0, 1), DimSize(4, 0, 0))]}
    assert learned.covers(BatchExtent(3, 9))


def test_code_that_depends_on_values_raises() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    model = Looks()
    with pytest.raises(RuntimeError, match="meta"):
        MetaModel(model).learn_shapes([ShapeProbe(0, model, output)], (torch.randn(2, 3, 4),), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "extent"),
    [
        ((torch.zeros(4, 6, dtype=torch.int64),), {}, (4, 6)),
        ((torch.zeros(4, 6),), {}, (4, 1)),
        ((), {"flag": True, "x": torch.zeros(2, 3, 5)}, (2, 3)),
        ((torch.zeros(4),), {}, (4, 1)),
        ((torch.zeros(()), "text"), {}, (1, 1)),
    ],
)
def test_the_extent_is_that_of_the_first_tensor(args: tuple, kwargs: dict, extent: tuple) -> None:
    assert batch_extent(args, kwargs) == extent


SIZES = st.builds(DimSize, st.integers(1, 500), st.integers(0, 1), st.integers(0, 2))


@given(st.lists(SIZES, max_size=4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_the_rule_follows_from_two_runs(rule: list[DimSize], batch: int, length: int, rows: int, tokens: int) -> None:
    here, other, third = BatchExtent(batch, length), BatchExtent(batch + 3, length + 5), BatchExtent(rows, tokens)
    found = shape_rule(tuple(s.of(here) for s in rule), tuple(s.of(other) for s in rule), here, other)
    for size, true in zip(found, rule, strict=True):
        assert size.of(here) == true.of(here)
        assert size.of(other) == true.of(other)
    ratios = {(1 + 3 / batch) ** b * (1 + 5 / length) ** n for b in (0, 1) for n in (0, 1, 2)}
    if len({round(ratio, 9) for ratio in ratios}) == 6:  # no two rules grow alike
        assert [s.of(third) for s in found] == [s.of(third) for s in rule]


def test_a_size_without_a_rule_raises() -> None:
    with pytest.raises(ValueError, match="a dim of 10 for"):
        shape_rule((2, 10), (5, 11), BatchExtent(2, 4), BatchExtent(5, 9))
    with pytest.raises(ValueError, match="2 dims becomes one of 1"):
        shape_rule((2, 10), (5,), BatchExtent(2, 4), BatchExtent(5, 9))
