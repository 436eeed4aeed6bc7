"""Run a model over batches, and pass the activations at its targets on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from flexcache import hooks
from flexcache.hooks.read.activation_hooks import activations_only
from flexcache.hooks.read.measure import input_device
from flexcache.parallel.fsdp import reset_after_early_stop
from flexcache.recording.forward.batch import Batch, Padding, unplanned_batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import to_tensors
from flexcache.recording.forward.objective import OBJECTIVE, check_value, spread_by_token
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.site import PATTERN

FAILURES = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)
"""Errors that the code of a model raises on inputs that it cannot run."""
Sink = Callable[[Batch, str, int | None, torch.Tensor], None]
"""Called with a batch, the name of an array, a layer, and values of shape (sequences, longest, features…)."""
ONE_TOKEN = unplanned_batch([np.zeros(1, np.int32)])


@contextmanager
def open_forward(
    model: torch.nn.Module, targets: CaptureTargets, pad: Padding, sink: Sink, group: ModelParallelGroup
) -> Iterator[Callable[[Batch | None], None]]:
    """Yield a function that runs the model over a batch, right-padded, and passes the values of *targets* to *sink*.

    Where a model is on several processes, each sink gets what its process writes. None instead of a batch runs a single
    token and reads nothing, for other processes that share the weights. A forward stops after the last site; with an
    objective it runs to the end, followed by the backward pass.
    """
    objective, gathering = targets.objective, group.gathering
    device = input_device(model)
    numbers = {point: number for number, point in enumerate(targets.points)}
    current: Batch | None = None

    def read_point(point: hooks.HookPoint, tensor: torch.Tensor) -> None:
        if current is None:
            return
        values = tensor.detach()
        if gathering is not None:
            whole = gathering.gather_activation(point, numbers[point], values)
            if whole is None:
                return
            longest = current.shape[1]
            values = point.reshape_to_tokens(whole, (current.shape[0], gathering.padded_length(longest)))
            values = values[:, :, :longest, :longest] if point.side == PATTERN else values[:, :longest]
        transform = targets.transforms.get(point.array)
        sink(current, point.array, point.layer, values if transform is None else transform(values, current))

    def forward(batch: Batch | None) -> None:
        nonlocal current
        current, run = batch, batch or ONE_TOKEN
        width = None if gathering is None else gathering.padded_length(run.shape[1])
        inputs = to_tensors(model, run.inputs(pad, width), device)
        if gathering is not None:
            inputs |= gathering.position_inputs(inputs["input_ids"])
            inputs = inputs if gathering.masked else {k: v for k, v in inputs.items() if k != "attention_mask"}
        if objective is None:
            points.forward(**inputs)
            return
        value = points.differentiate(lambda output: check_value(objective(output, run), run), **inputs)
        spread = spread_by_token(value, run)
        if spread is not None and batch is not None and group.leads:
            sink(batch, OBJECTIVE, None, spread)

    if gathering is not None:
        gathering.learn_sharding(targets.points)
    own = targets.points if gathering is None else gathering.owned_points(targets.points)
    stop = objective is None and (gathering is None or gathering.stop)
    flowing = nullcontext() if objective is None else activations_only(model)
    try:
        with flowing, hooks.ActivationHooks(model, own, read_point, stop=stop, shape=gathering is None) as points:
            yield forward
    finally:
        reset_after_early_stop(model)
