"""Recompute units with the model and compare them with the stored rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from flexcache.array_spec import DTYPES
from flexcache.errors import DamagedError, MismatchError, StoreError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.names import unwrap_copies
from flexcache.identity import check_model, comparable_record
from flexcache.identity.behavior import is_repeatable
from flexcache.images.input import stored_image_input
from flexcache.recording.arguments import model_of, objective_of, tokenizer_of
from flexcache.recording.forward.batch import Batch, Padding
from flexcache.recording.forward.batch_reader import BatchReader, VirtualDigests
from flexcache.recording.forward.capture_targets import CaptureTargets, find_targets
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.forward.objective import Objective
from flexcache.recording.forward.transform import Transform
from flexcache.recording.run.batch_forward import open_forward
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.row_transfer import rows_of
from flexcache.store.format.int8 import outlier_count
from flexcache.store.format.model_comparison import CHANGED_MODEL, STEADY
from flexcache.store.read.store import Store

UNITS_LOOKED_AT = 4
LOAD_IT = "load the model as it was captured"


@dataclass(frozen=True)
class Recomputed:
    """The comparison of one site and layer of a recomputed unit: if every byte is *equal*, and how far values differ.

    The *difference* is the largest one, relative to the largest stored magnitude; the *relative_error* is the norm of
    all differences, relative to the norm of the stored values. Under the *same_conditions*, the unit has the
    fingerprint of this process, so that its bytes must be the same. Units whose rows were read while they were
    generated never have it, since here the whole text is run at once.
    """

    unit: int
    site: str
    layer: int | None
    equal: bool
    difference: float
    relative_error: float
    same_conditions: bool

    @property
    def wrong(self) -> bool:
        """True if the stored values differ although they were computed under the same conditions."""
        return self.same_conditions and not self.equal


def recompute(
    model: torch.nn.Module,
    path: str | Path,
    *,
    units: int = 3,
    seed: int = 0,
    tokenizer: Any = None,
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Recomputed]:
    """Run some committed units of a store through its model again, and compare every row with the stored one.

    Parameters
    ----------
    units
        Number of units, drawn at random with *seed*.
    tokenizer
        As in the capture, for the id of padding. For images, the image processor, or None for the one that the store
        describes.
    transforms, objective
        The functions that the store was captured with.
    progress
        Called with the rows of each batch.

    Raises
    ------
    StoreError
        Nothing is committed.
    MismatchError
        The model is not the one that the store was captured from.
    """
    store, model = Store(path), unwrap_copies(model_of(model))
    tokenizer = tokenizer_of(tokenizer, model)
    objective = objective_of(objective, tokenizer)
    committed = store.committed_units
    if not len(committed):
        raise StoreError("no unit is committed, so there is nothing to compare", where=str(path))
    chosen = np.sort(np.random.default_rng(seed).choice(committed, min(units, len(committed)), replace=False)).tolist()
    example = None
    if store.images:
        tokenizer = stored_image_input(store.provenance.tokenizer, model, tokenizer, where=str(path))
        example = tokenizer.example(model)
    reader, conditions = BatchReader(store.path), {}
    with closing(ModelParallelGroup(model)) as group:
        given = group.describe_model(model, example)
        check_model(comparable_record(store.provenance.model), given, str(path), remedy=LOAD_IT)
        targets = find_targets(model, store.spec, transforms, objective)
        now = fingerprint(model)

        def batches() -> Iterator[Batch]:
            for unit in chosen:
                record = store.ledger.read_record(unit)
                conditions[unit] = record.fingerprint == now
                for batch in reader.read_unit(unit, record.batch_tokens):
                    yield batch
                    progress(len(batch.rows))

        worst = _compare(model, store, targets, padding(model, tokenizer), group, batches())
    return [
        Recomputed(unit, name, layer, one.equal, one.difference, one.relative_error, conditions[unit])
        for (unit, name, layer), one in worst.items()
    ]


def check_rows(
    model: torch.nn.Module,
    store: Store,
    pad: Padding,
    group: ModelParallelGroup,
    now: dict[str, Any],
    *,
    most_tokens: int | None = None,
    remedy: str = CHANGED_MODEL,
) -> None:
    """Run the committed batch of the longest sequences again, and compare its rows with the stored ones.

    This detects what a small fixed input cannot: hooks that act only on later or on certain tokens. Gradients and
    transforms are not compared. Nothing is done if no unit was computed under the conditions *now*, if no batch has at
    most *most_tokens*, padding included, or if the model is on several processes.

    Raises
    ------
    MismatchError
        A row differs, by any bit, or by more than a tolerance if forward passes do not repeat bit for bit.
    """
    everything = store.spec
    sites = {site: layers for site, layers in everything.sites.items() if not site.endswith(".grad")}
    if not group.alone or not sites:
        return
    records = [store.ledger.read_record(unit) for unit in store.committed_units[:UNITS_LOOKED_AT].tolist()]
    alike = [(record.unit, record.batch_tokens) for record in records if record.fingerprint == now]
    reader = BatchReader(store.path)
    room = most_tokens or everything.batch_tokens
    batches = [batch for unit, budget in alike for batch in reader.read_unit(unit, budget)]
    batches = [batch for batch in batches if batch.shape[0] * batch.shape[1] <= room]
    if not batches:
        return
    longest = max(batches, key=lambda batch: max(end for _, end in batch.keep))
    targets = find_targets(model, everything.model_copy(update={"sites": sites, "transforms": {}, "objective": None}))
    try:
        found = _compare(model, store, targets, pad, group, [longest])
    except (DamagedError, torch.OutOfMemoryError):  # `verify` names the one, and batches that fit are found later
        return
    exact = is_repeatable(model)
    found = {key: one for key, one in found.items() if exact or key[2] not in store.arrays[key[1]].virtual}
    wrong = {
        (name, layer): one.difference
        for (_, name, layer), one in found.items()
        if not (one.equal if exact else one.difference <= STEADY.get(store.arrays[name].dtype, STEADY["bfloat16"]))
    }
    if wrong:
        (name, layer), difference = max(wrong.items(), key=lambda item: item[1])
        raise MismatchError(
            "the model computes something else than the one that the store was made from",
            where=str(store.path),
            expected=f"the stored rows {longest.rows.start} to {longest.rows.stop - 1}, under the same conditions",
            found=f"{len(wrong)} of its arrays and layers differ, {name} of layer {layer} by {difference:.2g} of its"
            " largest value",
            remedy=f"{remedy}; flexcache verify tells if the store is damaged",
        )


@dataclass
class _Comparison:
    """Sums and maxima of the differences of one array and layer of a unit."""

    equal: bool = True
    largest: float = 0.0
    scale: float = 0.0
    squares: float = 0.0
    stored_squares: float = 0.0

    def add(self, found: np.ndarray, held: np.ndarray) -> None:
        """Compare the values of a batch with the stored ones."""
        same = found.tobytes() == held.tobytes()
        stored = held.astype(np.float64)
        apart = np.zeros(1) if same else np.abs(found.astype(np.float64) - stored)
        self.equal = self.equal and same
        self.largest = max(self.largest, float(apart.max()))
        self.scale = max(self.scale, float(np.abs(stored).max()))
        self.squares += float(apart @ apart)
        self.stored_squares += float(stored @ stored)

    def add_digest(self, found: np.ndarray, digest: str) -> None:
        """Compare the values of a batch with the digest of virtual rows, which tells no size of a difference."""
        if xxhash.xxh3_128_hexdigest(found.view(np.uint8).data) != digest:
            self.equal, self.largest = False, np.inf

    @property
    def difference(self) -> float:
        """The largest difference, relative to the largest stored magnitude; infinite for virtual rows that differ."""
        return self.largest / max(self.scale, 1e-30)

    @property
    def relative_error(self) -> float:
        """The norm of the differences, relative to the norm of the stored values; infinite as `difference`."""
        return np.inf if np.isinf(self.largest) else float(np.sqrt(self.squares / max(self.stored_squares, 1e-60)))


def _compare(
    model: torch.nn.Module,
    store: Store,
    targets: CaptureTargets,
    pad: Padding,
    group: ModelParallelGroup,
    batches: Iterable[Batch],
) -> dict[tuple[int, str, int | None], _Comparison]:
    """Return the comparisons by unit, array and layer."""
    found: defaultdict[tuple[int, str, int | None], _Comparison] = defaultdict(_Comparison)
    digests = VirtualDigests(store)

    def compare(batch: Batch, name: str, layer: int | None, values: torch.Tensor) -> None:
        dtype = DTYPES[store.arrays[name].dtype]
        (content, spans), *_ = rows_of(batch, values, dtype, outlier_count(name, store.arrays))
        rows = np.concatenate([content[start : start + count] for start, count in spans]).view(dtype)
        if layer in store.arrays[name].virtual:
            found[batch.unit, name, layer].add_digest(rows, digests.read(batch, name, layer))
            return
        held = store.read(name, layer, slice(batch.rows.start, batch.rows.stop), raw=True).reshape(-1)
        found[batch.unit, name, layer].add(rows, held)

    with evaluation_mode(model), open_forward(model, targets, pad, compare, group) as forward:
        for batch in batches:
            forward(batch)
    return found
