"""Prove by small forwards of a model, before the plan, that it keeps packed documents apart."""

from __future__ import annotations

import numpy as np
import torch

from flexcache.errors import ConfigError
from flexcache.hooks.locate.vision import compute_dtype
from flexcache.hooks.read.activation_hooks import accepts_keyword
from flexcache.hooks.read.measure import example_inputs
from flexcache.recording.checks.comparison import TrialForward, Values, name_key, relative_differences
from flexcache.recording.forward.batch import Batch, Padding, unplanned_batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.run.model_parallel_group import ModelParallelGroup

FIRST, SECOND = 13, 17
"""Tokens of the two documents of the example."""
LEAK = 0.05
"""Bound on the influence of the first document, as a share of its influence without isolation.
Rounding may cause that much, such as in mixtures of experts."""


def check_isolation(model: torch.nn.Module, targets: CaptureTargets, pad: Padding, group: ModelParallelGroup) -> None:
    """Raise ConfigError if rows of packed, isolated documents are not those of the documents alone.

    Of two documents in one sequence, the second must not change with the first, and must have the values that it has
    alone, at every site of *targets*. The results of transforms are not compared. The model must take positions, and be
    on one process.
    """
    kind = type(model).__name__
    if not group.alone:
        raise ConfigError(
            "isolated documents can be captured only from models that one process holds",
            where="packing.isolate",
            found=f"{kind}, over several processes",
            remedy="leave isolate out, or packing",
        )
    if not accepts_keyword(model, "position_ids"):
        raise _not_isolated(kind, "its forward takes no position_ids")
    ids = example_inputs(model, shape=(3, FIRST + SECOND))["input_ids"].cpu().numpy().astype(np.int32)
    second, short = ids[0, FIRST:], ids[2, :FIRST]
    sequences = [np.append(first[:FIRST], second) for first in ids[:2]] + [short]
    begins = np.array([0, FIRST], np.int32)
    trial = TrialForward(model, targets, pad, group)

    def read_values(batch: Batch) -> Values:
        try:
            return trial.read_values(batch, lambda array, values: None if array in targets.transforms else values)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise _not_isolated(kind, f"{type(error).__name__}: {error}") from error

    isolated = read_values(unplanned_batch(sequences, begins=[begins, begins, begins[:1]]))
    alone, mixed = read_values(unplanned_batch([second])), read_values(unplanned_batch(sequences))
    dtype = compute_dtype(model)
    tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for key, values in isolated.items():
        seconds = [values[line, FIRST : FIRST + SECOND] for line in (0, 1)]
        leak, allowed = _difference(*seconds), LEAK * _difference(*mixed[key][:2, FIRST : FIRST + SECOND])
        if leak > allowed:
            found = f"{name_key(key)} changes with the document in front of it, by {leak:.1e} of its norm"
            raise _not_isolated(kind, found)
        error = _difference(seconds[0], alone[key][0])
        if not error <= tolerance:
            found = f"{name_key(key)} differs by {error:.1e} of its norm from that of the document alone"
            raise _not_isolated(kind, found)


def _difference(values: torch.Tensor, others: torch.Tensor) -> float:
    """Return the largest relative difference of a token."""
    return float(relative_differences(values.flatten(1), others.flatten(1)).max())


def _not_isolated(kind: str, found: str) -> ConfigError:
    return ConfigError(
        "the model does not keep packed documents apart",
        where=f"packing.isolate, {kind}",
        expected="attention within each document, where positions restart, as many models of transformers have it",
        found=found,
        remedy="leave isolate out, so that attention crosses documents, or packing",
    )
