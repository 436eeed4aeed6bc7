"""The folder of a sweep: its plan and the results of finished batches, for resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from analysis.replay.sweeps.batch_result import BatchResult
from analysis.replay.sweeps.results import FORMAT
from analysis.replay.sweeps.sweep_plan import SweepPlan
from flexcache.errors import MismatchError
from flexcache.recording.forward.batch import Batch
from flexcache.store.storage.atomic_files import write_json

PARTS, PLAN = "parts", "question.json"


class SweepFolder:
    """Results of finished batches on disk.

    Raises
    ------
    MismatchError
        The folder holds another sweep.
    """

    def __init__(self, folder: Path, plan: SweepPlan) -> None:
        self.parts = folder / PARTS
        self.parts.mkdir(parents=True, exist_ok=True)
        path = folder / PLAN
        if not path.exists():
            write_json(path, {"format": FORMAT, "digest": plan.digest, **plan.describe()})
            return
        saved = json.loads(path.read_text("utf-8"))
        earlier = saved.get("digest")
        if (saved.get("format"), earlier) != (FORMAT, plan.digest):
            raise MismatchError(
                "the folder holds another sweep",
                where=str(folder),
                expected=f"the sweep {plan.digest[:12]}…",
                found=f"{str(earlier)[:12]}…, {saved.get('format', 'of an earlier version')}",
                remedy="choose another folder, or remove this one",
            )

    def read_results(self) -> dict[str, BatchResult]:
        """Return the results of finished batches by batch name."""
        found = {}
        for path in sorted(self.parts.glob("*.npz")):
            with np.load(path, allow_pickle=False) as data:
                found[path.stem] = BatchResult(**data)
        return found

    def write_result(self, batch: Batch, result: BatchResult) -> None:
        """Write the result of a batch atomically."""
        path = self.parts / f"{batch_name(batch)}.npz"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **vars(result))
        temporary.replace(path)


def batch_name(batch: Batch) -> str:
    """Return a name that is unique among the batches of a store."""
    return f"{batch.unit}-{batch.rows.start}"
