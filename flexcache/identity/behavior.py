"""Outputs of a model on a small fixed input, kept as a digest of their bits and as a sketch of their values."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.position_tables import count_positions
from flexcache.hooks.read.measure import Example, ExampleReader, example_inputs, input_device, read_example

SHAPE = (2, 24)
"""Sequences and tokens of the input; the tokens divide into 2, 3, 4, 6, 8, 12 or 24 shards, and may be fewer."""
GROUPS = 12
"""Groups of consecutive tokens in a sketch."""
OUTPUT = "(output)"


def record_behavior(
    model: nn.Module,
    conditions: Mapping[str, Any],
    reader: ExampleReader = read_example,
    example: Example | None = None,
    tokens: int | None = None,
) -> dict[str, Any] | None:
    """Run a model on a small fixed input and return a record of the outputs of every block and the head.

    Parameters
    ----------
    conditions
        Everything that the bits of a forward depend on: records under equal conditions are compared bit for bit.
    reader
        Runs and reads the forward; collective for a model on several processes.
    example
        Makes the input; by default token ids, or pixels for an image model.
    tokens
        Length of the sequences of the input, at most 24; by default that of `fixed_length`.

    Returns
    -------
    dict, a few kB
        ``inputs``: a digest of the input; ``conditions``; ``dtype``; ``names`` of the modules; ``bits``: a digest of
        each output, XXH3-64; ``sketches``: base64 of float32, shape (names, 12, 2): for each group of tokens a random
        projection of the output, and its norm. None if the model cannot run, since some weights were not loaded.
    """
    if any(parameter.device.type == "meta" for parameter in model.parameters()) and not _offloads(model):
        return None
    inputs = example_inputs(model, example, (SHAPE[0], tokens or fixed_length(model)))
    points = _block_outputs(model)
    try:
        first = _read(model, points, reader, inputs)
    except SiteError:
        if not points or reader is not read_example:
            raise
        first = _read(model, points := (), reader, inputs)  # blocks that are only containers never run
    names = list(first)
    sketches = np.stack([sketch(_finite(first[name])) for name in names])
    return {
        "inputs": _bits(*_tensors(inputs)),
        "conditions": dict(conditions),
        "repeatable": is_repeatable(model),
        "dtype": str(first[names[0]].dtype).removeprefix("torch."),
        "names": names,
        "bits": [_bits(first[name]) for name in names],
        "sketches": base64.b64encode(sketches.astype("<f4").tobytes()).decode(),
    }


def fixed_length(model: nn.Module) -> int:
    """Return the tokens of the fixed input: 24, or the number of the model's positions if that is smaller."""
    return min((SHAPE[1], *(count for count in count_positions(model) if count is not None)))


def is_repeatable(model: nn.Module) -> bool:
    """Return True if equal forwards give equal bits: on a CPU, without experts.

    A GPU may add in a different order each time. Products of the few rows of an expert round by how memory is aligned.
    """
    experts = any(re.search("expert|moe", type(module).__name__, re.IGNORECASE) for module in model.modules())
    return input_device(model).type == "cpu" and not experts


def sketch(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return a random-sign projection and the norm of each of 12 groups of rows: (rows…, features) to (12, 2).

    The difference of two projections is about the norm of the difference of the projected values (Achlioptas 2003,
    database-friendly random projections).
    """
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)
    found = np.zeros((GROUPS, 2))
    for number, group in enumerate(np.array_split(rows.astype(np.float64), GROUPS)):
        flat = group.reshape(-1)
        drawn = np.random.Philox(key=number).random_raw(-(-flat.size // 64)).astype("<u8")
        signs = np.unpackbits(drawn.view(np.uint8), count=flat.size, bitorder="little") * 2.0 - 1.0
        found[number] = flat @ signs, np.linalg.norm(flat)
    return found


def _finite(values: torch.Tensor) -> NDArray[np.float32]:
    """Return values bounded to a moderate size, since a head may give the lowest number, or infinity, for a token."""
    bounded: NDArray[np.float32] = values.float().nan_to_num(0, 0, 0).clamp(-1e30, 1e30).cpu().numpy()
    return bounded


def _block_outputs(model: nn.Module) -> tuple[HookPoint, ...]:
    """Return the hook points of the outputs of all blocks; none if the blocks cannot be found."""
    try:
        path, blocks = find_blocks(model)
    except SiteError:
        return ()
    return tuple(HookPoint("block", layer, f"{path}.{layer}") for layer in range(len(blocks)))


def _read(
    model: nn.Module, points: tuple[HookPoint, ...], reader: ExampleReader, inputs: Any
) -> dict[str, torch.Tensor]:
    read = reader(model, points, lambda sequences, tokens: inputs)
    found = {point.module: read.values[point] for point in points}
    output = _output(read.output)
    return found if output is None else {**found, OUTPUT: output}


def _output(output: Any) -> torch.Tensor | None:
    """Return the logits of a model's output, or its first tensor of floating-point numbers."""
    if isinstance(output, torch.Tensor):
        return None if hasattr(output, "full_tensor") else output.detach()
    if isinstance(output, Mapping):
        output = [output.get("logits"), *output.values()]
    values = output if isinstance(output, list | tuple) else ()
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return _output(tensors[0]) if tensors else None


def _tensors(inputs: Any) -> list[torch.Tensor]:
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else [inputs]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _bits(*tensors: torch.Tensor) -> str:
    hasher = xxhash.xxh3_64()
    for tensor in tensors:
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return hasher.hexdigest()


def _offloads(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())
