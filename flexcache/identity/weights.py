"""Digests of every value that a model holds: parameters, buffers, packed and quantized weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import xxhash
from torch import nn

from flexcache.hooks.locate.names import modules_by_path

CHUNK = 64 << 20
"""Bytes that are copied from a device at a time."""


@dataclass(frozen=True)
class TensorDigests:
    """XXH3-128 of tensors by name.

    Attributes
    ----------
    weights : dict from str to str
        Parameters, persistent buffers, and everything else in the state dict of a module.
    computed : dict from str to str
        Other tensors, which a model computes when it is loaded, such as rotary frequencies; shape, then digest.
    """

    weights: dict[str, str]
    computed: dict[str, str]


def digest_tensors(model: nn.Module) -> TensorDigests:
    """Return a digest of every tensor of a model, over all of its values.

    Names are those in the unwrapped model, and digests those of the whole tensors, so that the result is the same under
    DDP, FSDP, ZeRO and tensor parallelism. In a pipeline it covers the blocks of this process. Nothing is cached, since
    an edit through ``.data`` changes neither the address of a tensor nor its version counter. Collective if tensors are
    sharded.

    >>> sorted(digest_tensors(nn.Linear(2, 1)).weights)
    ['bias', 'weight']
    """
    weights: dict[str, str] = {}
    computed: dict[str, str] = {}
    tied: dict[nn.Parameter, str] = {}
    offloaded = _offloaded(model)
    owners = fsdp1_owners(model)
    for owner, members in groupby(modules_by_path(model).items(), lambda item: owners.get(item[1])):
        with _summoned(owner):
            for path, module in members:
                with _partitioned(module):
                    for key, value, persistent in _entries(module):
                        name = f"{path}.{key}".lstrip(".")
                        text = tied.get(value) if isinstance(value, nn.Parameter) else None
                        text = _digest(offloaded.get(name, value)) if text is None else text
                        if isinstance(value, nn.Parameter):
                            tied[value] = text
                        (weights if persistent else computed)[name] = text
    return TensorDigests(weights, computed)


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return the XXH3-128 of named digests, independent of their order."""
    return xxhash.xxh3_128_hexdigest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())


def _entries(module: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name of each tensor, or tree of tensors, of a module alone, and whether it is saved with the model."""
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    for key, value in saved.items():
        if value is not None:
            yield key, value, True
    others = {**module._buffers, **{k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}}
    for key, value in others.items():
        if value is not None and key not in saved:
            yield key, value, False


def _digest(value: Any) -> str:
    """Return the shape of a tensor and its digest, or the digest of a tree of tensors and plain values."""
    hasher = xxhash.xxh3_128()
    _update(hasher, value)
    return f"{tuple(getattr(value, 'shape', ()))} {hasher.hexdigest()}"


def _update(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        _update_tensor(hasher, value.detach())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            _update(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"[{len(value)}]".encode())
        for item in value:
            _update(hasher, item)
    elif hasattr(value, "getvalue"):
        hasher.update(value.getvalue())
    elif value is None or isinstance(value, str | bytes | int | float | torch.dtype):
        hasher.update(repr(value).encode())
    else:
        hasher.update(type(value).__qualname__.encode())


def _update_tensor(hasher: Any, tensor: torch.Tensor) -> None:
    hasher.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            hasher.update(name.encode())
            _update(hasher, getattr(tensor, name))
    elif tensor.is_quantized:
        _update(hasher, [tensor.int_repr(), *_scales(tensor)])
    elif tensor.layout != torch.strided:
        _update_tensor(hasher, tensor.to_dense())
    elif tensor.device.type != "meta" and tensor.numel():
        content = tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
        flat = content.reshape(-1).view(torch.uint8)
        for part in flat.split(CHUNK):
            there = part.cpu()
            # not by numpy: a tensor that numpy has seen cannot be resized, and FSDP frees parameters by resizing
            hasher.update((ctypes.c_char * there.numel()).from_address(there.data_ptr()))


def _scales(tensor: torch.Tensor) -> list[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.q_scale(), tensor.q_zero_point()]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()]


# Modules whose values a process does not hold between forwards


def _summoned(owner: nn.Module | None) -> AbstractContextManager[Any]:
    """Gather the parameters of one FSDP1 unit."""
    if owner is None:
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(owner, recurse=False, writeback=False)


def fsdp1_owners(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the innermost FSDP1 unit of each module."""
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            found |= dict.fromkeys(module.modules(), module)
    return found


def _partitioned(module: nn.Module) -> AbstractContextManager[Any]:
    """Gather the parameters that ZeRO-3 has partitioned."""
    partitioned = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return gathered


def _offloaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values that accelerate keeps elsewhere while a parameter is on the meta device."""
    found: dict[str, torch.Tensor] = {}
    for path, module in modules_by_path(model).items():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            values = getattr(one, "weights_map", None)
            if values is None:
                continue
            inside = getattr(one, "place_submodules", False)
            named = (*module.named_parameters(recurse=inside), *module.named_buffers(recurse=inside))
            for key, tensor in named:
                if tensor.device.type == "meta":
                    found[f"{path}.{key}".lstrip(".")] = values[key]
    return found
