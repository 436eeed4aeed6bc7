"""Find which sequences may share a batch, by small forwards of the model before the plan.

A model need not respect the attention mask: FNet has none, convolutions read past the end of a sequence, mixtures of
experts of a fixed capacity drop tokens in favour of other sequences. So a padded batch is compared with a batch of
equal lengths, and that with one sequence alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from flexcache.errors import CaptureError, ConfigError, PlanError
from flexcache.hooks.locate.encoder_decoder import DECODER_INPUT_IDS
from flexcache.hooks.locate.vision import compute_dtype
from flexcache.hooks.read.measure import EXAMPLE_SHAPE, example_inputs, input_device
from flexcache.plan import Batching
from flexcache.recording.checks.comparison import (
    Key,
    TrialForward,
    Values,
    name_key,
    relative_differences,
)
from flexcache.recording.forward.batch import Batch, Padding, unplanned_batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.run.batch_forward import FAILURES
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.site import PATTERN
from flexcache.spec import CaptureSpec
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation

LONGEST = 131
"""Most tokens of the long sequence of the example; the short ones have half as many, more than common chunks of 64."""
SHORTS = 3
"""Short sequences of the example."""
SMALLEST = EXAMPLE_SHAPE[1]
FLOAT32_EPS, TF32_EPS = 2.0**-23, 2.0**-10
EXACT = 1e-5
"""Bound in float32, relative to a token's norm: some 80 roundings, far more than the layers of a model accumulate."""
GRADIENTS = 10
"""Factor by which bounds are wider for gradients, whose rounding passes through the model twice."""
ROUNDINGS = 4
"""Bound in other dtypes, in units of eps, or of the rounding between batch sizes if that is larger.
The median of the short sequences counts, since rounding may route a single token to another expert."""
NEIGHBOURS = 16
"""The same for a batch of equal lengths against a sequence alone; the median of its tokens counts."""
COPIED = 1 << 28
"""Most parameters of a model of lower precision that is compared by a copy in float32, unless its bits are equal."""
SMALL = 0.01
"""Share of the mean norm of a sequence that is the least scale of a token: gradients vanish at some tokens."""
LEVELS: tuple[Batching, ...] = get_args(Batching)
NOTICES = {
    "equal_lengths": "padding changes activations of the model, so batches hold sequences of one length only",
    "single": "the model mixes the sequences of a batch, so each batch holds one sequence",
}


@dataclass(frozen=True)
class Verdict:
    """The sequences that may share a batch, and the site that changes in larger batches, and by how much."""

    batching: Batching = "padded"
    because: str = ""

    def describe(self) -> dict[str, Any]:
        """Return the record for the provenance of a store."""
        return {"batching": {"batches": self.batching, **({"because": self.because} if self.because else {})}}


def batching_notice(store: Store) -> str:
    """Return a message for the user if the batches of a store are not padded, else an empty string."""
    kind = store.provenance.batching or "padded"
    return "" if kind == "padded" else f"{store.provenance.others['batching'].get('because')}: {NOTICES[kind]}"


def has_batching(path: StoreLocation) -> bool:
    """Return True if the path has a store that was planned with `find_batching`."""
    return (path / "zarr.json").exists() and Store(path).provenance.batching is not None


def find_batching(
    model: torch.nn.Module, targets: CaptureTargets, pad: Padding, spec: CaptureSpec, group: ModelParallelGroup
) -> Verdict:
    """Return which sequences may share a batch so that each has the same activations as alone.

    Three small forwards are compared at every site, before transforms: short sequences with a long one, padded; the
    short ones by themselves; and one of them alone. Images are of one size and need no padding. Collective if several
    processes share the model. ConfigError if the model cannot run a sequence with an attention mask.
    """
    if not isinstance(pad, int):
        return Verdict()
    trial = TrialForward(model, replace(targets, transforms={}), pad, group)
    most = min(LONGEST, spec.max_length or LONGEST, spec.batch_tokens // (SHORTS + 1))
    sizes = [most, SMALLEST] if group.alone and most > SMALLEST else [SMALLEST]
    for size in sizes:  # a model may take fewer tokens than its configuration says
        batches = _example(model, size, spec.isolated)
        read = [_read_shorts(trial, batch) for batch in batches]
        if not any(isinstance(values, Exception) for values in read):
            break
    alone, eps = read[0], unit_rounding(model)
    failed = f"{type(alone).__name__}: {alone}" if isinstance(alone, Exception) else ""
    if group.alone and eps > FLOAT32_EPS and not _equal(read):
        finer = _read_in_float32(trial, batches)
        read, eps = (finer, FLOAT32_EPS) if finer else (read, eps)
    verdict = Verdict() if isinstance(read[0], Exception) else _compared(read[0], read[1], read[2], eps)
    told = group.gather_values((LEVELS.index(verdict.batching), verdict.because, failed))
    if failed := next((error for *_, error in told if error), ""):
        raise ConfigError(
            "the model cannot run a small sequence",
            where=type(model).__name__,
            expected=f"a forward of 1 × {(SMALLEST + 1) // 2} tokens, given {' and '.join(batches[0].inputs(pad))}",
            found=failed,
            remedy="use a model whose forward takes these",
        )
    level, because, _ = max(told, key=lambda one: one[0])
    return Verdict(LEVELS[level], because)


def check_batching(store: Store, verdict: Verdict) -> None:
    """Raise PlanError if a store has batches in which its model mixes sequences."""
    planned = store.provenance.batching or "padded"
    if LEVELS.index(verdict.batching) > LEVELS.index(planned):
        raise PlanError(
            "the store has batches in which this model mixes sequences",
            where=str(store.path),
            expected="activations of each sequence as if it were alone",
            found=verdict.because,
            remedy="capture into another path, whose batches are then planned for this model",
        )


def _example(model: torch.nn.Module, long: int, isolated: bool) -> tuple[Batch, Batch, Batch]:
    """Return batches of one short sequence, of several of equal length, and of the same after a long one."""
    short = (long + 1) // 2
    given = {name: values.cpu().numpy() for name, values in example_inputs(model, shape=(SHORTS + 1, long)).items()}
    context = given["input_ids"] if DECODER_INPUT_IDS in given else None

    def batch(lines: Sequence[int]) -> Batch:
        lengths = [short if line else long for line in lines]

        def cut(ids: np.ndarray) -> list[np.ndarray]:
            return [ids[line, :length].astype(np.int32) for line, length in zip(lines, lengths, strict=True)]

        return unplanned_batch(
            cut(given.get(DECODER_INPUT_IDS, given["input_ids"])),
            documents=[max(0, line - 1) for line in lines],
            begins=[np.zeros(1, np.int32)] * len(lines) if isolated else None,
            context=None if context is None else cut(context),
        )

    shorts = range(1, SHORTS + 1)
    return batch([1]), batch([*shorts]), batch([0, *shorts])


def _read_shorts(trial: TrialForward, batch: Batch) -> Values | Exception:
    """Return the activations of the short sequences, shape (sequences, tokens, features), or the forward's error."""
    patterns = {point.array for point in trial.targets.points if point.side == PATTERN}
    short = min(len(tokens) for tokens in batch.tokens)

    def select(array: str, values: torch.Tensor) -> torch.Tensor:
        part = values[-SHORTS:]
        part = part[:, :, :short, :short].transpose(1, 2) if array in patterns else part[:, :short]
        return part.flatten(2)

    try:
        return trial.read_values(batch, select)
    except (*FAILURES, CaptureError) as error:
        return error


def _read_in_float32(trial: TrialForward, batches: Sequence[Batch]) -> list[Values | Exception]:
    """Return the activations of a float32 copy, with less rounding; empty if the model cannot be copied."""
    model = trial.model
    if sum(parameter.numel() for parameter in model.parameters()) > COPIED or input_device(model).type == "meta":
        return []
    try:
        finer = replace(trial, model=copy.deepcopy(model).float())
        read = [_read_shorts(finer, batch) for batch in batches]
    except Exception:  # quantised or offloaded weights raise anything
        return []
    return [] if any(isinstance(values, Exception) for values in read) else read


def _equal(read: Sequence[Values | Exception]) -> bool:
    """Return True if sequences alone, among equal ones and padded have the same bits."""
    alone, equal, padded = read
    if isinstance(alone, Exception) or isinstance(equal, Exception) or isinstance(padded, Exception):
        return False
    return all(
        torch.equal(equal[key][:1], values) and torch.equal(padded[key], equal[key]) for key, values in alone.items()
    )


def _compared(alone: Values, equal: Values | Exception, padded: Values | Exception, eps: float) -> Verdict:
    exact = eps <= FLOAT32_EPS
    if isinstance(equal, Exception):
        return Verdict("single", f"a batch fails: {type(equal).__name__}: {equal}")
    company = {key: _differences(equal[key][:1], values) for key, values in alone.items()}
    mixed = {key: float(values.max() if exact else values.median()) for key, values in company.items()}
    bounds = {key: _wider(key) * (EXACT if exact else NEIGHBOURS * eps) for key in mixed}
    if because := _beyond(mixed, bounds):
        return Verdict("single", because)
    if isinstance(padded, Exception):
        return Verdict("equal_lengths", f"a padded batch fails: {type(padded).__name__}: {padded}")
    moved = {key: _differences(padded[key], values) for key, values in equal.items()}
    leaks = {key: float((values if exact else values.median(dim=0).values).max()) for key, values in moved.items()}
    rounding = {key: max(eps, float(values.max())) for key, values in company.items()}
    bounds = {key: _wider(key) * (EXACT if exact else ROUNDINGS * rounding[key]) for key in leaks}
    because = _beyond(leaks, bounds)
    return Verdict("equal_lengths", because) if because else Verdict()


def _differences(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return relative differences, shape (sequences, tokens); values that are not finite are left to the recorder."""
    return relative_differences(values, others, floor=SMALL).nan_to_num(nan=0.0)


def _wider(key: Key) -> int:
    return GRADIENTS if key[0].endswith(".grad") else 1


def _beyond(differences: dict[Key, float], bounds: dict[Key, float]) -> str:
    """Return a message of where activations differ most, if any exceeds its bound; else an empty string."""
    worst = max(differences, key=lambda key: differences[key] / bounds[key], default=None)
    if worst is None or differences[worst] <= bounds[worst]:
        return ""
    return f"{name_key(worst)} changes by {differences[worst]:.1e} of its norm with what else is in the batch"


def unit_rounding(model: torch.nn.Module) -> float:
    """Return the rounding of a model's arithmetic: that of its weights' dtype, or of TF32 on a GPU."""
    dtype = compute_dtype(model)
    if dtype != torch.float32 or input_device(model).type != "cuda":
        return torch.finfo(dtype).eps
    convolves = any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in model.modules())
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32 or (convolves and torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by another of torch's interfaces, which do not mix
        tf32 = True
    return TF32_EPS if tf32 else FLOAT32_EPS
