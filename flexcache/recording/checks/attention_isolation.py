"""Whether a model keeps packed documents apart, shown by small forwards of the very model before the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flexcache.errors import ConfigError
from flexcache.hooks.read.activation_hooks import accepts
from flexcache.hooks.read.measure import example_inputs
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import Padding
from flexcache.recording.run.forward_loop import forwards
from flexcache.recording.run.model_parallel_group import ModelParallelGroup

FRONT, BEHIND = 13, 17
"""Tokens of the two documents of the example."""
LEAK = 0.05
"""Of the influence that the document in front has without isolation: what rounding may be of it, such as in experts."""

Values = dict[tuple[str, int | None], torch.Tensor]


def check_isolation(model: torch.nn.Module, targets: CaptureTargets, pad: Padding, group: ModelParallelGroup) -> None:
    """Refuse a model whose rows of packed, isolated documents are not those of the documents alone.

    Of two documents in one sequence, the second must not change with the first, and must have the values that it has
    alone, at every site that is read. What transforms make of activations is not compared.

    Raises
    ------
    ConfigError
        The model takes no positions, lets documents see each other, is spread over several processes.
    """
    kind = type(model).__name__
    if not group.alone:
        raise ConfigError(
            "isolated documents are captured of models that one process holds",
            where="packing.isolate",
            found=f"{kind}, over several processes",
            remedy="leave isolate out, or packing",
        )
    if not accepts(model, "position_ids"):
        raise _refused(kind, "its forward takes no position_ids")
    ids = example_inputs(model, shape=(3, FRONT + BEHIND))["input_ids"].cpu().numpy().astype(np.int32)
    behind, short = ids[0, FRONT:], ids[2, :FRONT]
    packed = _batch([np.append(front[:FRONT], behind) for front in ids[:2]] + [short])
    begins = np.array([0, FRONT], np.int32)
    apart = replace(packed, begins=(begins, begins, begins[:1]))

    def read(batch: Batch) -> Values:
        found: Values = {}

        def keep(array: str, layer: int | None, values: torch.Tensor) -> None:
            if array not in targets.transforms:
                found[array, layer] = values.float().cpu()

        with forwards(model, targets, pad, keep, group) as forward:
            try:
                forward(batch)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                raise _refused(kind, f"{type(error).__name__}: {error}") from error
        return found

    together, alone, seen = read(apart), read(_batch([behind])), read(packed)
    tolerance = 1e-4 if _dtype(model) == torch.float32 else 8 * torch.finfo(_dtype(model)).eps
    for key, values in together.items():
        first, second = values[0, FRONT : FRONT + BEHIND], values[1, FRONT : FRONT + BEHIND]
        leak = _apart(first, second)
        allowed = LEAK * _apart(*(seen[key][line, FRONT : FRONT + BEHIND] for line in (0, 1)))
        where = key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
        if leak > allowed:
            raise _refused(kind, f"{where} changes with the document in front of it, by {leak:.1e} of its norm")
        error = _apart(first, alone[key][0])
        if not error <= tolerance:
            raise _refused(kind, f"{where} is {error:.1e} of its norm from that of the document alone")


def _batch(sequences: list[np.ndarray]) -> Batch:
    counts = [len(tokens) for tokens in sequences]
    keep = tuple((0, count) for count in counts)
    return Batch(0, 0, range(sum(counts)), np.arange(len(counts)), tuple(sequences), keep)


def _apart(values: torch.Tensor, others: torch.Tensor) -> float:
    """Return the largest difference of two activations of a token, relative to their norm."""
    a, b = values.flatten(1), others.flatten(1)
    scale = torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp(min=1e-30)
    return float(((a - b).norm(dim=1) / scale).max())


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _refused(kind: str, found: str) -> ConfigError:
    return ConfigError(
        "the model does not keep packed documents apart",
        where=f"packing.isolate, {kind}",
        expected="attention within each document, where positions begin anew, as transformers has it in many models",
        found=found,
        remedy="leave isolate out, so that attention goes across documents, or packing",
    )
