"""Structure of a model by name, so that an error can state what has changed in it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from flexcache.hooks.locate.names import modules_by_path, unwrap_model
from flexcache.hooks.read.user_hooks import user_changes

Structure = dict[str, Any]

FEW = 3
"""Most values of one setting that are recorded; a setting that differs from block to block tells nothing."""


def describe_structure(model: nn.Module) -> Structure:
    """Return adapters, quantization, hooks of the user, classes of modules and their settings.

    Returns
    -------
    dict
        ``adapters``: state of each by name; ``quantization``: the configuration as JSON, or None; ``hooks``: paths with
        the names of functions; ``modules``: number of modules of each class and form; ``settings``: numbers, texts and
        functions that modules of a class hold, with the number of modules.
    """
    named = modules_by_path(model)
    kinds: Counter[str] = Counter()
    settings: dict[str, Counter[str]] = defaultdict(Counter)
    for module in dict.fromkeys(named.values()):
        kind = _kind(module)
        kinds[f"{kind}({module.extra_repr()})" if not any(True for _ in module.children()) else kind] += 1
        for key, text in _settings(module):
            settings[f"{kind}.{key}"][text] += 1
    return {
        "adapters": _adapters(named),
        "quantization": _quantization(model),
        "hooks": [f"{path or '(model)'}: {_name(hook)}" for path, hook in user_changes(model)],
        "modules": dict(sorted(kinds.items())),
        "settings": {
            key: dict(sorted(values.items())) for key, values in sorted(settings.items()) if len(values) <= FEW
        },
    }


def _kind(module: nn.Module) -> str:
    kind = next(cls for cls in type(module).__mro__ if not cls.__name__.startswith("FSDP"))
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    for key, value in vars(module).items():
        if key.startswith("_") or key in ("training", "name_or_path"):
            continue
        if isinstance(value, bool | int | float | str):
            yield key, str(value)
        elif isinstance(value, FunctionType | BuiltinFunctionType | partial):
            yield key, _name(value)


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _adapters(named: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the state of each PEFT adapter: active or not, merged or not, its scale, in how many modules."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for module in dict.fromkeys(named.values()):
        layer: Any = module
        if not (hasattr(layer, "adapter_layer_names") and hasattr(layer, "merged_adapters")):
            continue
        held = [getattr(layer, name, None) for name in layer.adapter_layer_names]
        scales = getattr(layer, "scaling", None)
        for name in {str(key) for group in held if group is not None and hasattr(group, "keys") for key in group}:
            active = not layer.disable_adapters and name in layer.active_adapters
            state = "merged" if name in layer.merged_adapters else "active" if active else "inactive"
            scale = scales.get(name) if isinstance(scales, Mapping) else None
            found[name][state if scale is None else f"{state}, scale {scale:g}"] += 1
    return {
        name: "; ".join(f"{state}, {count} modules" for state, count in sorted(states.items()))
        for name, states in sorted(found.items())
    }


def _quantization(model: nn.Module) -> str | None:
    config = getattr(getattr(unwrap_model(model), "config", None), "quantization_config", None)
    if config is None:
        return None
    told = config.to_dict() if hasattr(config, "to_dict") else config
    return json.dumps(told, sort_keys=True, default=str)
