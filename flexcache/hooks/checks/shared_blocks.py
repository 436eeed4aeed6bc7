"""Blocks that two models have in common, from the first on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.names import adapter_prefix, modules_by_path, unwrap_adapter, unwrap_model
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.hooks.read.user_hooks import user_hooks
from flexcache.site import Site

WITHOUT_EFFECT = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("id2label", "label2id", "pad_token_id", "bos_token_id", "eos_token_id", "quantization_config"),
)
"""Settings of a configuration that change no block, or whose effect shows in classes and tensors."""

OWN = ("training", "name_or_path")
"""Attributes of modules that are no settings."""


def count_shared_blocks(one: nn.Module, other: nn.Module) -> int:
    """Return how many blocks, from the first on, have equal modules, settings and tensors in both models.

    It is 0 if the models differ in their configuration, such as a window of attention, or in anything that runs before
    or outside the blocks, or have hooks of a user.
    """
    try:
        found = [find_blocks(model) for model in (one, other)]
    except SiteError:
        return 0
    if len(found[0][1]) != len(found[1][1]) or any(user_hooks(model) or _has_prefix(model) for model in (one, other)):
        return 0
    if _configuration(one) != _configuration(other):
        return 0
    paths = [path.removeprefix(adapter_prefix(model)) for model, (path, _) in zip((one, other), found, strict=True)]
    parts = [_parts(model, path) for model, path in zip((one, other), paths, strict=True)]
    if paths[0] != paths[1] or not _equal(parts[0].get(-1, {}), parts[1].get(-1, {})):
        return 0
    depth = len(found[0][1])
    return next((n for n in range(depth) if not _equal(parts[0].get(n, {}), parts[1].get(n, {}))), depth)


def _has_prefix(model: nn.Module) -> bool:
    """Return True if an adapter puts keys and values in front of each sequence, in every block."""
    config = getattr(unwrap_model(model), "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _configuration(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model that may change what its blocks compute."""
    config: Any = getattr(unwrap_adapter(unwrap_model(model)), "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {"settings": _effective(settings), "attention": getattr(config, "_attn_implementation", None)}


def _effective(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _effective(part) for name, part in value.items() if name not in WITHOUT_EFFECT}


def _parts(model: nn.Module, path: str) -> dict[int, dict[str, Any]]:
    """Return modules, settings and tensors by name, of each block, and as number -1 of what is outside the blocks."""
    found: dict[int, dict[str, Any]] = {}
    prefix, after = adapter_prefix(model), _paths_after(model)
    for full, module in modules_by_path(model).items():
        if full != prefix[:-1] and not full.startswith(prefix):
            continue  # a wrapper of the adapter
        if full in after or full.startswith(tuple(f"{place}." for place in after)):
            continue
        name = full[len(prefix) :]
        first = name.removeprefix(f"{path}.").partition(".")[0]
        number = int(first) if name.startswith(f"{path}.") and first.isdecimal() else -1
        held = found.setdefault(number, {})
        held[name] = type(module)
        held |= {
            f"{name}.{key}": str(value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and not key.startswith("_") and key not in OWN
        }
        held |= {f"{name}:{key}": value for key, value in (*module._parameters.items(), *module._buffers.items())}
    return found


def _paths_after(model: nn.Module) -> set[str]:
    """Return the paths of the last norm and of the unembedding."""
    try:
        found = {point.module for point in find_hook_points(model, Site("final_norm"))}
    except SiteError:
        found = set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return found | {name for name, module in modules_by_path(model).items() if module is head}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if both have the same names with equal classes, settings and tensors."""
    return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(one == other)
    if one is other or (one.shape == other.shape and one.dtype == other.dtype and one.data_ptr() == other.data_ptr()):
        return True
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and one.equal(other)
