"""Describe a live model for the provenance of a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import nn

from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.names import WRAPPERS, modules_by_path, unwrap_model
from flexcache.hooks.read.measure import Example, ExampleReader, read_example
from flexcache.identity.behavior import fixed_length, record_behavior
from flexcache.identity.structure import describe_structure
from flexcache.identity.weights import TensorDigests, combine_digests, digest_tensors, fsdp1_owners
from flexcache.model.adapters import RECORD
from flexcache.model.loading import keep_4bit_layout
from flexcache.store.format.model_record import ADAPTERS, CONFIG, CONFIG_DIGEST, IDENTITY, NAMES, SAMPLE

SAMPLED_VALUES = 64
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "distributed_config")
"""Settings that state where a model came from or how it is run."""
WITHOUT_EFFECT = (
    *VOLATILE,
    *("architectures", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("id2label", "label2id", "quantization_config", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Settings that change no activation, or are recorded elsewhere."""

Gathered = Callable[[Any], list[Any]]
"""Return the value of each rank; collective."""


def describe_model(
    model: nn.Module,
    conditions: Mapping[str, Any] | None = None,
    *,
    reader: ExampleReader = read_example,
    gathered: Gathered = lambda own: [own],
    example: Example | None = None,
) -> dict[str, Any]:
    """Return a record of what a live model computes, for the provenance of a store.

    The model runs once on a small input, and each of its values is read once: 0.1 seconds for a gigabyte of weights.
    The record of its weights is the same however the model is distributed. Collective if it is distributed.

    Parameters
    ----------
    conditions
        Everything that the bits of a forward depend on, see `flexcache.recording.run.fingerprint`; None to skip the
        forward.
    reader
        Runs and reads a small forward; collective for a model on several processes.
    gathered
        Returns the value of each rank of the model.
    example
        Makes the input of the small forward; by default token ids, or pixels.

    Returns
    -------
    dict
        ``name`` and ``class``; the ``adapters`` of a model that `flexcache.ModelSource` loaded with some; digests of
        the configuration and of a sample of the weights, which earlier versions compare; and ``identity``: digests of
        all weights and buffers, the structure by name, and the behavior on a fixed input, see
        `flexcache.identity.differences`. `flexcache.identity.stored_record` leaves out what is only needed to name
        differences.

    Example
    -------
    >>> import torch
    >>> describe_model(torch.nn.Linear(2, 1))["class"]
    'Linear'
    """
    root = unwrap_model(model)
    keep_4bit_layout(root)
    config: Any = getattr(root, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {key: value for key, value in settings.items() if key not in VOLATILE}
    try:
        text = json.dumps(settings, sort_keys=True, default=str)
    except TypeError:  # keys of several types
        text = json.dumps(_plain(settings))
    kind = next(cls for cls in type(root).__mro__ if not cls.__name__.startswith("FSDP"))
    with evaluation_mode(model), torch.no_grad():
        # first the forward: some models compute their rotary frequencies again for the length of their input
        before = _versions(model)
        tokens = min(gathered(fixed_length(model)))
        ran = None if conditions is None else record_behavior(model, conditions, reader, example, tokens)
        counting = {name for name, version in _versions(model).items() if before.get(name) != version}
        parts = describe_structure(model)
        found = [TensorDigests(**told) for told in gathered(vars(digest_tensors(model)))]
    weights = {name: value for one in found for name, value in one.weights.items() if name not in counting}
    computed = {name: value for one in found for name, value in one.computed.items() if name not in counting}
    adapters = getattr(root, RECORD, None)
    return {
        "name": getattr(config, "_name_or_path", "") or kind.__name__,
        "class": kind.__name__,
        **({ADAPTERS: adapters} if adapters else {}),
        CONFIG_DIGEST: xxhash.xxh3_128_hexdigest(text.encode()),
        SAMPLE: None if _out_of_reach(model) else sample_digest(root),
        IDENTITY: {
            CONFIG: _plain(settings),
            "weights": combine_digests(weights),
            "tensors": f"{len(weights)} ({xxhash.xxh3_64_hexdigest(repr(sorted(weights)).encode())})",
            "marks": "".join(xxhash.xxh3_64_hexdigest(weights[name].encode())[:8] for name in sorted(weights)),
            NAMES: sorted(weights),
            "computed": _patterns(computed),
            "structure": parts,
            "behavior": ran,
        },
    }


def sample_digest(model: nn.Module) -> str:
    """Return the XXH3-128 of up to 64 evenly spaced values of each parameter and buffer of the state dict.

    Stores of earlier versions, which hold no other digest of the weights, are compared by it.
    """
    hasher = xxhash.xxh3_128()
    for path, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        name = ".".join(part for part in path.split(".") if part not in WRAPPERS)
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole = tensor.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        if whole.device.type == "meta" or type(whole.data) is not torch.Tensor or not whole.numel():
            continue
        flat = whole.reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES]
        hasher.update(picked.to("cpu", torch.float64 if picked.is_floating_point() else None).numpy().tobytes())
    return hasher.hexdigest()


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, by name, values that change when a forward writes to a tensor that is no parameter, such as a counter.

    FSDP1 replaces views of its flat parameters in every forward, so its modules are left out.
    """
    sharded = fsdp1_owners(model)
    return {
        f"{path}.{key}".lstrip("."): (id(value), value._version)
        for path, module in modules_by_path(model).items()
        for key, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, torch.Tensor) and not value.is_inference() and module not in sharded
    }


def _plain(value: Any) -> Any:
    """Return settings as values that JSON can hold, sorted, without those that have no effect."""
    if isinstance(value, Mapping):
        kept = {str(key): part for key, part in value.items() if str(key) not in WITHOUT_EFFECT}
        return {key: _plain(kept[key]) for key in sorted(kept)}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value) if isinstance(value, torch.dtype | torch.device) else type(value).__qualname__


def _patterns(computed: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the digests of tensors by name without block numbers, since blocks hold copies of the same tensor."""
    found: dict[str, set[str]] = {}
    for name, text in computed.items():
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        found.setdefault(pattern, set()).add(text)
    return {pattern: sorted(texts) for pattern, texts in sorted(found.items())}


def _out_of_reach(model: nn.Module) -> bool:
    """Return True if a rank cannot assemble the model's weights: FSDP1, a pipeline, ZeRO-3."""
    apart = ("FullyShardedDataParallel", "PipelineIdentityLayer", "Stages")
    return any(type(module).__name__ in apart for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
