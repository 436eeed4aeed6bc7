from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from flexcache.errors import ConfigError, HookError, SiteError
from flexcache.hooks import FlexModel, HookFunction
from tests.models import HIDDEN, tiny, token_ids

BLOCK = "model.layers.1"


def native(model: nn.Module, name: str, side: str = "output", **inputs: Any) -> torch.Tensor:
    """Return what a plain hook reads in one forward."""
    found = []
    module = model.get_submodule(name)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_: nn.Module, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = (
        module.register_forward_hook(after)
        if side == "output"
        else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    with torch.no_grad():
        model(**({"input_ids": token_ids(), "use_cache": False} | inputs))
    handle.remove()
    return found[0]


def run(model: nn.Module, ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    return model(input_ids=token_ids() if ids is None else ids, use_cache=False, **inputs).logits


def hooks_left(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parameters = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return parameters + sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# What is read


@pytest.mark.parametrize(
    ("family", "name", "side"),
    [
        ("llama", BLOCK, "output"),
        ("llama", f"{BLOCK}.self_attn", "input"),
        ("llama", f"{BLOCK}.self_attn", "output"),
        ("llama", f"{BLOCK}.mlp.act_fn", "input"),
        ("gpt2", "transformer.h.2.mlp", "output"),
        ("falcon", "transformer.h.1.mlp", "output"),
        ("mixtral", "model.layers.0.mlp.experts", "output"),
        ("bert", "bert.encoder.layer.3.output.dense", "input"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_equal_those_of_a_native_hook(family: str, name: str, side: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    inputs = {} if family == "bert" else {"use_cache": False}
    expected = native(model, name, side, **inputs) if family != "bert" else None
    if expected is None:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
        model(input_ids=token_ids())
        handle.remove()
        expected = seen[0].detach()
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, acts)
    register = flex.register_forward_hook if side == "output" else flex.register_forward_pre_hook
    register(HookFunction(name))
    with torch.no_grad():
        flex(input_ids=token_ids(), **inputs)
    assert list(acts) == [name]
    assert len(acts[name]) == 1
    assert acts[name][0].dtype == dtype
    assert not acts[name][0].requires_grad
    assert torch.equal(acts[name][0], expected)


def test_recorded_activations_are_copies() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).add_(100)

    model, acts = InPlace(), {}
    flex = FlexModel(model, acts)
    flex.register_forward_hook(HookFunction("linear"))
    x = torch.randn(2, 4)
    flex(x)
    assert torch.equal(acts["linear"][0], model.linear(x))


def test_several_forwards_append_and_generation_appends_each_step() -> None:
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(tiny("llama"), acts)
    flex.register_forward_hook(HookFunction(BLOCK))
    run(flex)
    run(flex, token_ids(2, 5))
    assert [tuple(x.shape) for x in acts[BLOCK]] == [(3, 7, HIDDEN), (2, 5, HIDDEN)]
    with torch.no_grad():
        out = flex.generate(token_ids(2, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, 8)
    assert [x.shape[1] for x in acts[BLOCK][2:]] == [5, 1, 1]


def test_a_module_that_runs_twice_records_two_tensors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.f(self.f(x))

    model, acts = Twice(), {}
    flex = FlexModel(model, acts)
    flex.register_forward_hook(HookFunction("f"))
    x = torch.randn(2, 3)
    y = flex(x)
    assert torch.equal(acts["f"][0], model.f(x))
    assert torch.equal(acts["f"][1], y)


def test_inference_mode_records_ordinary_tensors() -> None:
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(tiny("llama"), acts)
    flex.register_forward_hook(HookFunction(BLOCK))
    with torch.inference_mode():
        run(flex)
    assert not acts[BLOCK][0].is_inference()
    weight = torch.ones(HIDDEN, requires_grad=True)
    (acts[BLOCK][0] * weight).sum().backward()
    assert torch.equal(weight.grad, acts[BLOCK][0].sum(dim=(0, 1)))


def test_one_tensor_of_several_is_selected_by_number() -> None:
    model, acts = tiny("llama"), {}
    flex = FlexModel(model, acts)
    flex.register_forward_hook(HookFunction("model.rotary_emb", key="cos"))
    flex.register_forward_hook(HookFunction("model.rotary_emb", unpack_idx=1, key="sin"))
    run(flex)
    torch.testing.assert_close(acts["cos"][0] ** 2 + acts["sin"][0] ** 2, torch.ones(1, 7, 16))
    flex.register_forward_hook(HookFunction("model.norm", unpack_idx=1))
    with pytest.raises(HookError, match=r"model\.norm \(forward\)"):
        run(flex)
    assert len(acts["cos"]) == 1, "a forward that fails leaves nothing"


def test_an_expected_shape_is_checked() -> None:
    flex = FlexModel(tiny("llama"), {})
    flex.register_forward_hook(HookFunction(BLOCK, expected_shape=(None, None, HIDDEN)))
    flex.register_forward_hook(HookFunction("model.layers.2", expected_shape=(3, 7, HIDDEN)))
    run(flex)
    for shape in ((None, None, 65), (None, HIDDEN), (4, None, None)):
        flex = FlexModel(tiny("llama"), {})
        flex.register_forward_hook(HookFunction(BLOCK, expected_shape=shape))
        with pytest.raises(HookError, match="expected: "):
            run(flex)


# What is edited


def test_an_edit_equals_a_native_hook_and_the_value_before_it_is_recorded() -> None:
    model, acts = tiny("llama"), {}
    before = native(model, BLOCK)
    handle = model.get_submodule(BLOCK).register_forward_hook(lambda m, a, o: 2 * o + 1)
    expected = run(model)
    handle.remove()
    flex = FlexModel(model, acts)
    flex.register_forward_hook(HookFunction(BLOCK, editing_function=lambda m, x, c, t: 2 * x + 1))
    assert torch.equal(run(flex), expected)
    assert torch.equal(acts[BLOCK][0], before)


def test_edits_of_inputs_reach_keyword_arguments() -> None:
    model = tiny("llama")
    name = f"{BLOCK}.self_attn"

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"hidden_states": -kwargs["hidden_states"]}

    handle = model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
    expected = run(model)
    handle.remove()
    flex = FlexModel(model, {})
    flex.register_forward_pre_hook(HookFunction(name, editing_function=lambda m, x, c, t: -x))
    assert torch.equal(run(flex), expected)


def test_an_in_place_edit_changes_only_the_value_that_the_module_receives() -> None:
    """The input of the MLP's norm is the residual stream, which is added again later."""
    model = tiny("llama")
    name = f"{BLOCK}.post_attention_layernorm"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: (3 * a[0],))
    expected = run(model)
    handle.remove()
    flex = FlexModel(model, {})
    flex.register_forward_pre_hook(HookFunction(name, editing_function=lambda m, x, c, t: x.mul_(3)))
    with torch.no_grad():
        assert torch.equal(run(flex), expected)


def test_edits_of_one_module_run_in_the_order_of_registration() -> None:
    model = tiny("llama")
    flex = FlexModel(model, acts := {})
    for side in ("forward", "forward_pre"):
        register = getattr(flex, f"register_{side}_hook")
        register(HookFunction("lm_head", key=f"{side} 1", editing_function=lambda m, x, c, t: x + 1))
        register(HookFunction("lm_head", key=f"{side} 2", editing_function=lambda m, x, c, t: x * 2))
    logits = run(flex)
    for side in ("forward", "forward_pre"):
        assert torch.equal(acts[f"{side} 2"][0], acts[f"{side} 1"][0] + 1)
    assert torch.equal(logits, 2 * acts["forward 2"][0])


@pytest.mark.parametrize("groups", [None, []])
def test_a_forward_inside_an_edit_is_recorded_apart_from_the_one_around_it(groups: list[str] | None) -> None:
    model, names = tiny("llama"), [f"model.layers.{layer}" for layer in range(3)]
    here, other = token_ids(), token_ids().flip(1)
    alone = [native(model, name, input_ids=other) for name in names]
    running: list[bool] = []

    def patched(module: nn.Module, activation: torch.Tensor, context: Any, modules: Any) -> torch.Tensor:
        if not running:
            running.append(True)
            run(wrapped, other, **({} if groups is None else {"groups": groups}))
        return activation

    output: dict[str, list[torch.Tensor]] = {}
    wrapped = FlexModel(model, output)
    for number, name in enumerate(names):
        wrapped.register_forward_hook(HookFunction(name, None, patched if number == 1 else None))
    with torch.no_grad():
        run(wrapped, here)
    wrapped.restore()
    around = [native(model, name, input_ids=here) for name in names]
    for name, inside, outside in zip(names, alone, around, strict=True):
        expected = [outside] if groups is not None else [inside, outside]
        assert len(output[name]) == len(expected)
        assert all(torch.equal(one, two) for one, two in zip(output[name], expected, strict=True))


def test_an_edit_receives_the_module_the_context_and_the_trainable_modules() -> None:
    model = tiny("llama")
    flex = FlexModel(model, {})
    adapter = nn.Linear(HIDDEN, HIDDEN)
    flex.register_trainable_module("adapter", adapter)
    seen = []

    def edit(module: nn.Module, x: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
        seen.append((module, modules["adapter"]))
        save_ctx.count = getattr(save_ctx, "count", 0) + 1
        return x

    flex.register_forward_hook(HookFunction(BLOCK, editing_function=edit))
    run(flex)
    run(flex)
    assert seen == [(model.get_submodule(BLOCK), adapter)] * 2
    assert flex.save_ctx.count == 2


def test_an_edit_is_cast_back_to_the_dtype_of_the_activation() -> None:
    flex = FlexModel(tiny("llama", torch.bfloat16), {})
    flex.register_forward_hook(HookFunction(BLOCK, editing_function=lambda m, x, c, t: x.double()))
    assert run(flex).dtype == torch.bfloat16


@pytest.mark.parametrize(("result", "found"), [(None, "None"), (torch.zeros(2), r"shape \(2,\)")])
def test_an_edit_that_returns_no_activation_raises_and_records_nothing(result: Any, found: str) -> None:
    flex = FlexModel(tiny("llama"), acts := {})
    flex.register_forward_hook(HookFunction("model.layers.0"))
    flex.register_forward_hook(HookFunction(BLOCK, editing_function=lambda m, x, c, t: result))
    with pytest.raises(HookError, match=rf"expected: a tensor of shape \(3, 7, 64\)\n  found: {found}"):
        run(flex)
    assert not acts


# What is refused


def test_a_hook_that_does_not_fire_raises_and_records_nothing() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
            return self.b(self.a(x)) if both else self.a(x)

    flex = FlexModel(Sometimes(), acts := {})
    for name in "ab":
        flex.register_forward_hook(HookFunction(name))
    flex(torch.ones(1, 2))
    with pytest.raises(HookError, match=r"did not fire.*\n  where: b \(forward\)"):
        flex(torch.ones(1, 2), both=False)
    assert {name: len(found) for name, found in acts.items()} == {"a": 1, "b": 1}
    flex.update_hook_groups("a", "first")
    flex(torch.ones(1, 2), both=False, groups="first")
    assert len(acts["a"]) == 2


def test_a_forward_that_raises_records_nothing_and_the_next_one_is_right() -> None:
    model = tiny("llama")
    flex = FlexModel(model, acts := {})
    flex.register_forward_hook(HookFunction("model.layers.0"))
    flex.register_forward_hook(HookFunction("model.layers.0.mlp", key="mlp"))
    handle = model.model.layers[2].register_forward_hook(lambda m, a, o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(flex)
    assert not acts
    alone = model.model.layers[0].mlp(torch.zeros(1, 1, HIDDEN))
    assert torch.equal(acts.pop("mlp")[0], alone), "a module called by itself after it is read, not lost"
    handle.remove()
    run(flex)
    assert len(acts["model.layers.0"]) == 1


def test_two_hooks_under_one_name_raise_unless_one_has_a_key_or_is_off() -> None:
    for second in (HookFunction(BLOCK, key="other"), HookFunction(BLOCK, record=False)):
        flex = FlexModel(tiny("llama"), acts := {})
        flex.register_forward_hook(HookFunction(BLOCK))
        flex.register_forward_pre_hook(second)
        run(flex)
        assert list(acts) == (["other", BLOCK] if second.record else [BLOCK]) or set(acts) == {"other", BLOCK}
    flex.register_forward_pre_hook(same := HookFunction(BLOCK))
    with pytest.raises(HookError, match=r"(?s)one name.*\(forward\).*\(forward_pre\)"):
        run(flex)
    flex.update_hook_groups([same], "second")
    flex(input_ids=token_ids(), groups="second", complement=True)
    assert len(acts[BLOCK]) == 2


def test_the_error_for_a_missing_name_gives_the_nearest() -> None:
    flex = FlexModel(tiny("llama"), {})
    with pytest.raises(SiteError, match=r"did you mean model\.layers\.1\.mlp\?"):
        flex.register_forward_hook(HookFunction("model.layers.1.mpl"))
    with pytest.raises(SiteError, match=r"hook the modules in it: model\.layers\.0"):
        flex.register_forward_hook(HookFunction("model.layers"))
    with pytest.raises(SiteError, match="did you mean weight"):
        flex.register_hook(HookFunction("lm_head.wieght"))
    function = HookFunction(BLOCK)
    flex.register_forward_hook(function)
    with pytest.raises(HookError, match="already registered"):
        flex.register_forward_hook(function)
    flex.register_trainable_module("w", nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="trainable module 'w'"):
        flex.register_trainable_module("w", nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="not distributed"):
        wide = FlexModel(tiny("llama"), {}, tensor_parallel_size=2)
        wide.register_forward_hook(HookFunction(BLOCK))
        run(wide)


# The wrapper as a module


def test_the_wrapper_has_the_models_attributes_and_names() -> None:
    model = tiny("llama")
    flex = FlexModel(model, None)
    assert flex.config is model.config
    assert flex.generate.__self__ is model
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = flex.nothing_of_the_kind
    assert list(flex.state_dict()) == list(model.state_dict())
    assert dict(flex.named_parameters()).keys() == dict(model.named_parameters()).keys()
    flex.register_trainable_module("w", nn.BatchNorm1d(3))
    added = set(flex.state_dict()) - set(model.state_dict())
    assert {"trainable_modules.w.weight", "trainable_modules.w.running_mean"} <= added
    assert any(p is flex.trainable_modules["w"].weight for p in flex.parameters())
    assert "trainable_modules.w.running_mean" in dict(flex.named_buffers())
    assert set(flex.wrapped_module_names) == {n for n, _ in model.named_modules() if n and n != "model.layers"}


def test_the_state_dict_can_be_loaded_again() -> None:
    first, second = FlexModel(tiny("llama"), None), FlexModel(tiny("llama"), None)
    for flex in (first, second):
        flex.register_trainable_module("w", nn.Linear(3, 3))
        with torch.no_grad():
            for parameter in flex.parameters():
                parameter.normal_()
    state = first.state_dict()
    result = second.load_state_dict(state)
    assert not result.missing_keys
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())
    missing = second.load_state_dict({k: v for k, v in state.items() if "w." not in k}, strict=False)
    assert missing.missing_keys == ["trainable_modules.w.weight", "trainable_modules.w.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({k: v for k, v in state.items() if "w." not in k})


def test_mode_and_dtype_changes_apply_to_the_model() -> None:
    flex = FlexModel(tiny("llama"), acts := {}).train()
    assert flex.module.training
    flex.eval().to(torch.bfloat16)
    flex.register_forward_hook(HookFunction(BLOCK))
    run(flex)
    assert acts[BLOCK][0].dtype == torch.bfloat16


def test_plain_torch_hooks_are_registered_on_the_wrapper() -> None:
    flex = FlexModel(tiny("llama"), None)
    seen = []
    flex.register_forward_hook(lambda m, a, o: seen.append(m))
    run(flex)
    assert seen == [flex]


def test_the_wrapper_lists_its_hook_functions() -> None:
    flex = FlexModel(tiny("llama"), None)
    flex.create_hook_group("mlps", "model.layers.*.mlp", editing_function=lambda m, x, c, t: x)
    flex.register_forward_pre_hook(HookFunction("lm_head"))
    assert flex.hooked()[0] == {
        "name": "model.layers.0.mlp",
        "key": "model.layers.0.mlp",
        "kind": "forward",
        "groups": ["all", "mlps"],
        "active": True,
        "edits": True,
    }
    flex.enable_hook_groups("mlps")
    assert "● model.layers.3.mlp (forward) edited in all, mlps" in repr(flex)
    assert "○ lm_head (forward_pre) in all" in repr(flex)


# No trace


def check_restored(model: nn.Module, logits: torch.Tensor, names: list[str]) -> None:
    assert hooks_left(model) == 0
    assert list(model.state_dict()) == names
    assert torch.equal(run(model), logits)


def test_restore_leaves_no_trace() -> None:
    model = tiny("llama")
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    logits, names = run(model), list(model.state_dict())
    flex = FlexModel(model, {})
    flex.register_forward_hook(HookFunction(BLOCK, editing_function=lambda m, x, c, t: 0 * x))
    flex.register_forward_pre_hook(HookFunction("lm_head"))
    flex.register_full_backward_hook(HookFunction("model.layers.2"))
    flex.register_hook(HookFunction("lm_head.weight", key="g"))
    flex.enable_hook_groups("all", complement=True)
    run(flex)
    flex.enable_hook_groups("all")
    run(flex).sum().backward()
    assert flex.restore() is model
    check_restored(model, logits, names)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert flex.restore() is model
    with pytest.raises(HookError, match="restored"):
        flex.register_forward_hook(HookFunction(BLOCK))


def test_restore_and_garbage_collection_leave_no_trace_after_an_error_in_a_hook() -> None:
    model = tiny("llama")
    logits, names = run(model), list(model.state_dict())
    for end in ("restore", "collect"):
        flex = FlexModel(model, {})
        flex.register_forward_hook(HookFunction(BLOCK, editing_function=lambda m, x, c, t: 1 / 0))
        flex.register_hook(HookFunction("lm_head.weight"))
        with pytest.raises(ZeroDivisionError):
            run(flex)
        if end == "restore":
            flex.restore()
        else:
            del flex
            gc.collect()
        check_restored(model, logits, names)


# Wrappers and ways to run


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_model_compiled_before_wrapping_is_read(backend: str) -> None:
    model = tiny("llama")
    expected = native(model, BLOCK)
    whole = torch.compile(model, backend=backend)
    with torch.no_grad():
        run(whole)
    inside = tiny("llama")
    inside.model.layers[1].compile(backend=backend)
    with torch.no_grad():
        run(inside)
    for compiled, name in ((whole, f"_orig_mod.{BLOCK}"), (whole, BLOCK), (inside, BLOCK)):
        flex = FlexModel(compiled, acts := {})
        flex.register_forward_hook(HookFunction(name))
        with torch.no_grad():
            run(flex)
        assert torch.equal(acts[name][0], expected)
        flex.restore()


def test_prefixes_of_wrappers_may_be_written_or_left_out() -> None:
    wrapped = nn.DataParallel(tiny("llama"))
    for name in (BLOCK, f"module.{BLOCK}", f"_fsdp_wrapped_module.{BLOCK}"):
        flex = FlexModel(wrapped, acts := {})
        flex.register_forward_hook(HookFunction(name))
        run(flex)
        assert list(acts) == [name]
        flex.restore()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_are_read_and_edited(where: str, tmp_path: Path) -> None:
    plain, model = tiny("llama"), tiny("llama")
    expected = native(plain, BLOCK)
    handle = plain.get_submodule(BLOCK).register_forward_hook(lambda m, a, o: -o)
    edited = run(plain)
    handle.remove()
    cpu = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    flex = FlexModel(model, acts := {})
    flex.register_forward_hook(HookFunction(BLOCK, editing_function=lambda m, x, c, t: -x))
    with torch.no_grad():
        assert torch.equal(run(flex), edited)
    assert torch.equal(acts[BLOCK][0], expected)
    flex.restore()
    assert not any("flexcache" in (h.__module__ or "") for m in model.modules() for h in m._forward_hooks.values())


def test_a_module_called_on_its_own_is_read() -> None:
    model = tiny("llama")
    flex = FlexModel(model, acts := {})
    flex.register_forward_hook(HookFunction("lm_head"))
    x = torch.randn(1, HIDDEN)
    y = model.lm_head(x)
    assert torch.equal(acts["lm_head"][0], y)
