"""How other tools keep the output of every block: functions that make, of a model, what runs a batch and returns it.

What they return is a tensor of (sequences, longest, hidden) for each block, padding included, detached from the model.
Each raises ImportError where the tool is not installed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

Inputs = dict[str, torch.Tensor]
Run = Callable[[Inputs], dict[str, torch.Tensor]]


def nnsight(model: Any, tokenizer: Any) -> Run:
    """`trace` over the model without its head, every block's output saved."""
    from nnsight import NNsight

    wrapped = NNsight(model.model)

    def run(inputs: Inputs) -> dict[str, torch.Tensor]:
        saved = []
        with torch.no_grad(), wrapped.trace(**inputs, use_cache=False):
            for block in wrapped.layers:
                saved.append(block.output.save())  # noqa: PERF401 - the body of a trace is no comprehension
        return {str(number): value for number, value in enumerate(saved)}

    return run


def transformer_lens(model: Any, tokenizer: Any) -> Run:
    """`run_with_cache` of the bridge that takes the model as it is, with the names of the blocks' outputs."""
    from transformer_lens.model_bridge import TransformerBridge

    with contextlib.redirect_stdout(io.StringIO()):
        bridge = TransformerBridge.boot_transformers(
            model.config._name_or_path, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=model.dtype
        )
    names = [f"blocks.{number}.hook_out" for number in range(model.config.num_hidden_layers)]

    def run(inputs: Inputs) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                names_filter=lambda name: name in names,
                return_type=None,
            )
        return {name: cache[name] for name in names}

    return run


def flex_model(model: Any, tokenizer: Any) -> Run:
    """FlexModel 0.1 over the model without its head: a `HookFunction` on each block.

    It asks for groups of NCCL; here they are of gloo.
    """
    import torch.distributed as dist
    from flex_model.core import FlexModel, HookFunction

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, list[torch.Tensor]] = {}
    with mock.patch.object(dist, "new_group", return_value=dist.group.WORLD):
        wrapped = FlexModel(model.model, found)
    for number in range(model.config.num_hidden_layers):
        wrapped.register_forward_hook(HookFunction(f"layers.{number}", expected_shape=(None, None, None)))

    def run(inputs: Inputs) -> dict[str, torch.Tensor]:
        found.clear()
        with torch.no_grad():
            wrapped(**inputs, use_cache=False)
        return {name: values[0] for name, values in found.items()}

    return run
