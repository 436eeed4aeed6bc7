"""Units run through the model again, and compared with what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexcache.errors import StoreError
from flexcache.hooks.names import peel
from flexcache.identity import check_model, comparable
from flexcache.images.input import stored_input
from flexcache.model import evaluating
from flexcache.recorder.batch import Batch, BatchReader
from flexcache.recorder.crew import Crew
from flexcache.recorder.fingerprint import fingerprint
from flexcache.recorder.imaging import padding
from flexcache.recorder.objective import Objective
from flexcache.recorder.reading import locate
from flexcache.recorder.rows import rows_of
from flexcache.recorder.running import forwards
from flexcache.recorder.transform import Transform
from flexcache.spec import DTYPES, Spec
from flexcache.store.store import Store


@dataclass(frozen=True)
class Recomputed:
    """One site and layer of a unit, computed again.

    Attributes
    ----------
    equal : bool
        Every byte is the same.
    difference : float
        The largest difference, relative to the largest magnitude of what is stored.
    same_conditions : bool
        The unit was computed under this process's fingerprint, so that its bytes must be the same.
    """

    unit: int
    site: str
    layer: int | None
    equal: bool
    difference: float
    same_conditions: bool

    @property
    def wrong(self) -> bool:
        """Whether the stored values are not what the model gives, under the conditions they were computed in."""
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
    """Run some committed units of a store through its model again, and compare every row with what is stored.

    Parameters
    ----------
    units
        How many, drawn at random with *seed*.
    tokenizer
        For the id of padding, as in the capture. Of images, the image processor, or None for what the store says of it.
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
    store, model = Store(path), peel(model)
    committed = store.committed_units
    if not len(committed):
        raise StoreError("no unit is committed, so there is nothing to compare", where=str(path))
    chosen = np.sort(np.random.default_rng(seed).choice(committed, min(units, len(committed)), replace=False)).tolist()
    example = None
    if store.images:
        tokenizer = stored_input(store, model, tokenizer)
        example = tokenizer.example(model)
    crew = Crew(model)
    given = crew.describe_model(model, example)
    check_model(comparable(store.provenance["model"]), given, str(path))
    reading = locate(model, Spec.model_validate(store.spec), transforms, objective)
    now = fingerprint(model)
    worst: dict[tuple[int, str, int | None], tuple[bool, float, float]] = {}
    batches: list[Batch] = []

    def compare(name: str, layer: int | None, values: torch.Tensor) -> None:
        batch, dtype = batches[0], DTYPES[store.arrays[name].dtype]
        (content, spans), *_ = rows_of(batch, values, dtype)
        found = np.concatenate([content[start : start + count] for start, count in spans]).view(dtype)
        held = store.read(name, layer, slice(batch.rows.start, batch.rows.stop), raw=True).reshape(-1)
        same = found.tobytes() == held.tobytes()
        apart = 0.0 if same else float(np.abs(found.astype(np.float64) - held.astype(np.float64)).max())
        equal, largest, scale = worst.get((batch.unit, name, layer), (True, 0.0, 0.0))
        scale = max(scale, float(np.abs(held.astype(np.float32)).max()))
        worst[batch.unit, name, layer] = equal and same, max(largest, apart), scale

    reader = BatchReader(store.path, mean=store.spec.get("rows") == "mean")
    conditions = {}
    with evaluating(model), forwards(model, reading, padding(model, tokenizer), compare, crew) as forward:
        for unit in chosen:
            record = store.ledger.read(unit)
            conditions[unit] = record.fingerprint == now
            for batch in reader.unit(unit, record.batch_tokens):
                batches[:] = [batch]
                forward(batch)
                progress(len(batch.rows))
    crew.close()
    return [
        Recomputed(unit, name, layer, equal, largest / max(scale, 1e-30), conditions[unit])
        for (unit, name, layer), (equal, largest, scale) in worst.items()
    ]
