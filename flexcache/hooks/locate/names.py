"""Modules of a model by path, without the prefixes of wrappers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from flexcache.parallel.stages import Stages

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which torch.compile, FSDP and activation checkpointing hold the wrapped module."""

COPYING = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def unwrap_module(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, FSDP or activation checkpointing, or *module* itself."""
    while name := next((name for name in WRAPPERS if name in module._modules), None):
        module = module.get_submodule(name)
    return module


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel, FSDP, torch.compile, and wrappers whose only child is ``module``."""
    model = unwrap_module(model)
    while [name for name, _ in model.named_children()] == ["module"]:
        model = unwrap_module(model.get_submodule("module"))
    return model


def unwrap_adapter(model: nn.Module) -> nn.Module:
    """Return the unwrapped model, or that inside it if it is a PeftModel."""
    root: Any = unwrap_model(model)
    inner: nn.Module = root.get_base_model() if hasattr(root, "peft_type") else root
    return inner


def adapter_prefix(model: nn.Module) -> str:
    """Return the path of the model inside a PeftModel, with a dot at its end; ``""`` for other models."""
    root, inner = unwrap_model(model), unwrap_adapter(model)
    return next((f"{name}." for name, module in root.named_modules() if module is inner and name), "")


def unwrap_copies(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that only copy it: DDP, DataParallel, and DeepSpeed if it shards no weights.

    A forward through these would wait for the other copies, or send them buffers. FSDP stays, since it shards weights.
    """
    while type(model).__name__ in COPYING and not _shards_weights(model):
        model = model.get_submodule("module")
    return model


def as_one_module(model: Any) -> nn.Module:
    """Return a model as one module: without wrappers that copy it, and with the stages of a pipeline combined."""
    if isinstance(model, nn.Module):
        return unwrap_copies(model)
    return Stages(model if isinstance(model, list) else [model])


def _shards_weights(engine: nn.Module) -> bool:
    stage = getattr(engine, "zero_optimization_stage", None)
    return stage is not None and stage() >= 3


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module of *model* by its dotted path in the unwrapped model, in module order.

    Of a wrapper and the module inside, which share a path, the inner one is returned: it reads and returns the values
    of the model's own code, without casts or padding of the wrapper. A module with two paths is returned under both.
    Of a pipeline, the modules of all stages on this rank are returned.

    >>> list(modules_by_path(nn.DataParallel(nn.Sequential(nn.ReLU()))))
    ['', '0']
    """
    roots = list(model.parts) if isinstance(model, Stages) else [unwrap_model(model)]
    found: dict[str, nn.Module] = {}
    for root in roots:
        for name, module in root.named_modules(remove_duplicate=False):
            found[".".join(part for part in name.split(".") if part not in WRAPPERS)] = module
    return found


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's language part, or None if the model has none."""
    config = getattr(unwrap_model(model), "config", None)
    part = getattr(config, "get_text_config", None)
    return config if part is None else part()


def is_container(module: nn.Module) -> bool:
    """Return True if *module* only holds other modules and never runs itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def runnable_paths(named: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the paths of the modules that can run."""
    return tuple(name for name, module in named.items() if name and not is_container(module))


def glob_regex(glob: str) -> str:
    """Return the regular expression for a glob over dotted paths; see `find_hook_points`.

    >>> re.fullmatch(glob_regex("layers.*.mlp"), "layers.0.mlp.up_proj") is None
    True
    """
    words = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = re.split(r"(\*\*|\*|\?|\[!?[^\]]+\])", glob)
    return "".join(
        words.get(word) or (f"[{word[1:-1].replace('!', '^', 1)}]" if word.startswith("[") else re.escape(word))
        for word in parts
        if word
    )
