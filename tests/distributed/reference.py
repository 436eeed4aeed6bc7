"""The single process that every strategy is held against: plain PyTorch hooks on a plain model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexcache.hooks import FlexModel, HookFunction
from tests.models import HIDDEN, tiny

TOLERANCE = 1e-5
ROWS, LENGTH = 4, 6

Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def first(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((found for part in value if (found := first(part)) is not None), None)
    return None


def close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"{what}: off by {error:.3g} of its largest value"


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean over tokens, so that the mean over ranks or microbatches of equal size is that of the whole batch."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def mixing(width: int, seed: int = 5) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, width)


def edit(module: nn.Module, x: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
    """Mix features and rows, so that neither a shard nor a rank's rows alone would do."""
    save_ctx.calls = getattr(save_ctx, "calls", 0) + 1
    name = next(name for name in modules if modules[name].in_features == x.shape[-1])
    return x + 0.5 * torch.tanh(modules[name](x)) + 0.1 * x.flip(0)


def edit_rows(module: nn.Module, x: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
    """Mix features alone: what a microbatch can do by itself."""
    name = next(name for name in modules if modules[name].in_features == x.shape[-1])
    return x + 0.5 * torch.tanh(modules[name](x))


@dataclass
class Found:
    """What one forward and backward of the plain model gives."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    output_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    runs: Counter[str] = field(default_factory=Counter)


def read(model: nn.Module, ids: torch.Tensor, call: Call = logits_of) -> Found:
    """Run the plain model once with plain hooks on every module below the root."""
    found, handles = Found(), []

    def before(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            x = first((args, kwargs))
            if x is None or name in found.inputs:
                return None
            found.inputs[name] = x.detach().clone()
            if x.requires_grad:
                view = x.view_as(x)
                view.register_hook(lambda g: found.input_grads.__setitem__(name, g.clone()))
                if args and args[0] is x:
                    return (view, *args[1:]), kwargs
                return args, {key: view if value is x else value for key, value in kwargs.items()}
            return None

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            x = first(output)
            found.runs[name] += 1
            if x is None or name in found.outputs:
                return
            found.outputs[name] = x.detach().clone()
            if x.requires_grad:
                x.register_hook(lambda g: found.output_grads.__setitem__(name, g.clone()))

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
    found.logits = call(model, ids)
    loss_of(found.logits, ids).backward()
    found.weights = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return found


def edited(
    model: nn.Module,
    ids: torch.Tensor,
    places: dict[str, str],
    modules: dict[str, nn.Module],
    call: Call = logits_of,
    function: Any = edit,
) -> Found:
    """Run the plain model with plain hooks that edit: *places* says which modules, and on which side."""
    from types import SimpleNamespace

    context, handles = SimpleNamespace(), []
    for name, side in places.items():
        module = model.get_submodule(name)
        if side == "output":

            def after(module: nn.Module, args: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (function(module, output[0], context, modules), *output[1:])
                return function(module, output, context, modules)

            handles.append(module.register_forward_hook(after))
        else:

            def before(module: nn.Module, args: Any) -> Any:
                return (function(module, args[0], context, modules), *args[1:])

            handles.append(module.register_forward_pre_hook(before))
    found = Found(logits=call(model, ids))
    loss_of(found.logits, ids).backward()
    found.weights = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for key, module in modules.items():
        found.weights |= {f"{key}.{name}": p.grad.clone() for name, p in module.named_parameters()}
        module.zero_grad()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradient(model: nn.Module, name: str) -> torch.Tensor:
    """Return the whole gradient of a weight of an unsharded name; of FSDP1, inside `summon_full_params`."""
    from flexcache.hooks.locate.names import WRAPPERS, unwrap_model

    found = {
        ".".join(part for part in path.split(".") if part not in WRAPPERS): parameter
        for path, parameter in unwrap_model(model).named_parameters()
    }
    return full(found[name].grad)


@dataclass
class Strategy:
    """A distributed copy of the model of a family, and how it is used.

    Attributes
    ----------
    rows
        The rows of the batch that this rank runs.
    sites
        Modules to read; all that ran, where None.
    """

    model: nn.Module
    rows: slice = field(default_factory=lambda: slice(None))
    family: str = "llama"
    sites: Iterable[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: bool = True
    call: Call = logits_of
    backward: Callable[[nn.Module, torch.Tensor], Any] = lambda model, loss: loss.backward()
    gradient: Callable[[nn.Module, str], torch.Tensor] = gradient
    reset: Callable[[nn.Module], Any] = lambda model: model.zero_grad()
    whole: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    tolerance: float = TOLERANCE
    overrides: dict[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()


PLACES = {
    "model.layers.1": "output",
    "model.layers.2.mlp.down_proj": "input",
    "model.layers.0.self_attn.q_proj": "output",
    "model.layers.3.self_attn.o_proj": "output",
}


def battery(strategy: Strategy, rank: int, places: dict[str, str] | None = None) -> None:
    """Hold a strategy against the single process: forward, gradients, edits, weights' gradients, and no trace."""
    from tests.models import token_ids

    ids = token_ids(ROWS, LENGTH)
    plain = tiny(strategy.family, **strategy.overrides)
    reference = read(plain, ids, strategy.call)
    _reads(strategy, reference, ids, rank)
    if places is not None and not places:
        return
    _edits(strategy, plain, ids, rank, PLACES if places is None else places)


def _reads(strategy: Strategy, reference: Found, ids: torch.Tensor, rank: int) -> None:
    acts: dict[str, list[torch.Tensor]] = {}
    model = FlexModel(strategy.model, acts, **strategy.options)
    chosen = [name for name in strategy.sites or reference.outputs if not any(part in name for part in strategy.skip)]
    expected: dict[str, torch.Tensor] = {}

    def add(kind: str, found: dict[str, torch.Tensor]) -> None:
        for name in chosen:
            if name in found:
                getattr(model, f"register_{kind}_hook")(HookFunction(name, key=f"{name}:{kind}"))
                expected[f"{name}:{kind}"] = found[name]

    add("forward", reference.outputs)
    add("forward_pre", reference.inputs)
    if strategy.weights:
        add("full_backward_pre", reference.output_grads)
        add("full_backward", reference.input_grads)
    logits = strategy.call(model, ids[strategy.rows])
    close(logits, reference.logits[strategy.rows], "logits", strategy.tolerance)
    if strategy.weights:
        strategy.backward(strategy.model, loss_of(logits, ids[strategy.rows]))
        with strategy.whole(strategy.model):
            for name, value in reference.weights.items():
                close(strategy.gradient(strategy.model, name), value, f"gradient of {name}", strategy.tolerance)
        strategy.reset(strategy.model)
    if rank == 0:
        assert set(acts) == set(expected), set(acts) ^ set(expected)
        for name, value in expected.items():
            assert len(acts[name]) == reference.runs[name.rpartition(":")[0]], f"{name}: {len(acts[name])} tensors"
            close(acts[name][0], value, name, strategy.tolerance)
    else:
        assert not acts
    assert model.restore() is strategy.model
    assert_no_trace(strategy.model)


def _edits(strategy: Strategy, plain: nn.Module, ids: torch.Tensor, rank: int, places: dict[str, str]) -> None:
    hidden = strategy.overrides.get("hidden_size", HIDDEN)
    widths = {plain.get_submodule(name).in_features if side == "input" else hidden for name, side in places.items()}
    modules = {f"w{width}": mixing(width) for width in widths}
    expected = edited(plain, ids, places, modules, strategy.call)
    model = FlexModel(strategy.model, None, **strategy.options)
    for key in modules:
        model.register_trainable_module(key, mixing(modules[key].in_features, seed=5 + rank))  # rank 0's count
    for name, side in places.items():
        register = model.register_forward_hook if side == "output" else model.register_forward_pre_hook
        register(HookFunction(name, editing_function=edit))
    logits = strategy.call(model, ids[strategy.rows])
    close(logits, expected.logits[strategy.rows], "edited logits", strategy.tolerance)
    assert model.save_ctx.calls == len(places)
    if strategy.weights:
        strategy.backward(strategy.model, loss_of(logits, ids[strategy.rows]))
        with strategy.whole(strategy.model):
            for name, value in expected.weights.items():
                if name.split(".")[0] in modules:
                    found = dict(model.trainable_modules.named_parameters())[name].grad
                else:
                    found = strategy.gradient(strategy.model, name)
                close(found, value, f"gradient of {name} under edits", strategy.tolerance)
        strategy.reset(strategy.model)
    model.restore()
    assert_no_trace(strategy.model)


def assert_no_trace(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            left = [hook for hook in getattr(module, kind).values() if "flexcache" in getattr(hook, "__module__", "")]
            assert not left, (name, kind)
