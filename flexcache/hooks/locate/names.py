"""Module names without the prefixes that wrappers put into them."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexcache.parallel.stages import Stages

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes under which torch.compile, FSDP and activation checkpointing hold the module that they wrap."""

COPYING = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def inner(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile, FSDP or activation checkpointing has wrapped, or *module* itself."""
    while name := next((name for name in WRAPPERS if name in module._modules), None):
        module = module.get_submodule(name)
    return module


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel, FSDP, torch.compile, and wrappers whose only child is ``module``."""
    model = inner(model)
    while [name for name, _ in model.named_children()] == ["module"]:
        model = inner(model.get_submodule("module"))
    return model


def peel(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that only copy it: DDP, DataParallel, and DeepSpeed where it shards no weights.

    A forward through them would wait for the other copies, or send them buffers. FSDP stays: it shards the weights.
    """
    while type(model).__name__ in COPYING and not _shards_weights(model):
        model = model.get_submodule("module")
    return model


def whole(model: Any) -> nn.Module:
    """Return a model as it runs over batches: what is inside of wrappers, or the stages of a pipeline as one module."""
    if isinstance(model, nn.Module):
        return peel(model)
    return Stages(model if isinstance(model, list) else [model])


def _shards_weights(engine: nn.Module) -> bool:
    stage = getattr(engine, "zero_optimization_stage", None)
    return stage is not None and stage() >= 3


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module of *model* by the dotted path that it has in the unwrapped model, in module order.

    Of a wrapper and the module in it, which share a path, the inner one: it reads and returns what the model's own
    code does, before and after any casting or padding of the wrapper's. A module under two paths is under both.

    Of stages of a pipeline: the modules of all that are on this rank.

    >>> list(modules(nn.DataParallel(nn.Sequential(nn.ReLU()))))
    ['', '0']
    """
    roots = list(model.parts) if isinstance(model, Stages) else [unwrap(model)]
    found: dict[str, nn.Module] = {}
    for root in roots:
        for name, module in root.named_modules(remove_duplicate=False):
            found[".".join(part for part in name.split(".") if part not in WRAPPERS)] = module
    return found


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's language part, or None where the model carries none."""
    config = getattr(unwrap(model), "config", None)
    part = getattr(config, "get_text_config", None)
    return config if part is None else part()
