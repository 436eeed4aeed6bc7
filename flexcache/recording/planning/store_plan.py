"""Plan a store: as a whole, or in parts whose units are captured while the rest of the corpus is planned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from flexcache.identity import stored_record
from flexcache.images.encoded import IMAGE
from flexcache.plan import Plan
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.recording.planning.planning import (
    Estimate,
    PlanInputs,
    estimate_size,
    plan_corpus,
    size_of_units,
    tokenizing,
)
from flexcache.recording.planning.store_identity import check_same, stored_identity
from flexcache.recording.run.fingerprint import versions
from flexcache.sequences import TokenizedCorpus
from flexcache.store.format.schema import is_planned, read_attributes
from flexcache.store.manage.dataset_card import card
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.create import Planner, check_free_space, check_names, create, elected_planner

GROWTH = 2
"""A part of the plan is added when the tokens that are planned are this many times those of the parts before."""


def plan_store(
    path: StoreLocation,
    inputs: PlanInputs,
    progress: ProgressCallback = ignore_progress,
    on_wait: Callable[[], None] = lambda: None,
) -> Estimate | None:
    """Create a store that holds its plan and no activations; it appears at *path* in one step.

    If several processes make this call, one plans and the others wait, calling *on_wait* regularly; if that process
    ends before it has finished, another takes over. The size of the plan is returned, or None if the store exists, or
    if another process made it.

    Raises
    ------
    PlanError
        The disk has no room for the whole store.
    StoreError
        The place is taken. DocumentsError as for `flexcache.sequences.tokenize_corpus`.
    """
    parts = _plan_parts(path, inputs, progress, on_wait, lambda: is_planned(path), grows=False)
    return next(iter([*parts]), None)


class BackgroundPlan:
    """The plan of a store that is made while its first units are captured.

    The first segment is planned by `begin`, the rest by a thread of the process that planned it. In other processes the
    thread waits, and takes over if that process ends. The store has the same bytes as if it was planned as a whole.
    Generators of documents, which cannot be read again after a stop, images, and stores on object storage are planned
    as a whole, and so is every store if *grows* is false.

    Attributes
    ----------
    amount : Estimate or None
        The size of what this process has planned so far; None if it planned nothing.
    """

    def __init__(
        self,
        path: StoreLocation,
        inputs: PlanInputs,
        progress: ProgressCallback = ignore_progress,
        on_wait: Callable[[], None] = lambda: None,
        *,
        grows: bool = True,
    ) -> None:
        documents = inputs.documents
        self._grows = grows and documents.count is not None and documents.content != IMAGE
        self._grows = self._grows and disk_path(path) is not None
        self._path, self._inputs, self._report, self._on_wait = path, inputs, progress, on_wait
        self._thread: threading.Thread | None = None
        self._stopped, self._error = threading.Event(), list[BaseException]()
        self.amount: Estimate | None = None

    def begin(self) -> None:
        """Return once units can be captured; errors as from `plan_store`."""
        parts = self._parts((self._path / "zarr.json").exists if self._grows else self._is_planned)
        self.amount = next(parts, None)
        if self._is_planned():
            parts.close()
            return
        self._thread = threading.Thread(target=self._finish, args=(parts,), name="flexcache-planning", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """True while a thread plans the rest of the corpus, or waits for the process that does."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error that ended the planning, if one did."""
        if self._error:
            raise self._error[0]

    def close(self) -> None:
        """Stop the thread; another process, or the next capture, plans the rest."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    # Private

    def _finish(self, parts: Generator[Estimate, None, None]) -> None:
        try:
            while True:
                for amount in parts:
                    self.amount = amount
                if self._is_planned():
                    return
                parts = self._parts(self._is_planned)
        except _StoppedError:
            pass
        except BaseException as error:
            self._error.append(error)

    def _parts(self, done: Callable[[], bool]) -> Generator[Estimate, None, None]:
        return _plan_parts(self._path, self._inputs, self._progress, self._wait, done, self._grows)

    def _is_planned(self) -> bool:
        return is_planned(self._path)

    def _progress(self, documents: int, tokens: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._report(documents, tokens)

    def _wait(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._on_wait()


class _StoppedError(Exception):
    """The capture has ended, so the thread that plans ends as well."""


def _plan_parts(
    path: StoreLocation,
    inputs: PlanInputs,
    progress: ProgressCallback,
    on_wait: Callable[[], None],
    done: Callable[[], bool],
    grows: bool,
) -> Generator[Estimate, None, None]:
    """Plan the store at *path* if this process is elected; yield the size of the plan each time that it has grown.

    MismatchError if the plan there is of something else; a model is compared before it computes a unit.
    """
    if not done() and (path / "zarr.json").exists():
        check_same(stored_identity(read_attributes(path)), inputs.identity(), path, allow_changed_model=True)
    with elected_planner(path, done, on_wait) as planner:
        if planner is None:
            return
        check_names(inputs.arrays)
        due = inputs.spec.segment_tokens
        for corpus in tokenizing(inputs, inputs.documents, planner.folder, progress):
            if grows and corpus.n_tokens >= due and size_of_units(inputs, corpus) is not None:
                due = GROWTH * corpus.n_tokens
                plan = plan_corpus(inputs, corpus).with_final_units()
                if plan.n_rows > _rows_planned(path):
                    corpus.write_part()
                    yield _publish(path, planner, inputs, corpus, plan)
        yield _publish(path, planner, inputs, corpus, plan_corpus(inputs, corpus))


def _publish(
    path: StoreLocation, planner: Planner, inputs: PlanInputs, corpus: TokenizedCorpus, plan: Plan
) -> Estimate:
    """Write a plan, and make it that of the store at *path*."""
    amount = _size(inputs, corpus, plan)
    exists = (path / "zarr.json").exists()
    before = read_attributes(path) if exists else None
    check_free_space(path, amount.bytes - (int(before["plan"]["bytes"]) if before else 0))
    content = {
        "spec": inputs.spec.model_dump(mode="json"),
        "provenance": {
            "model": stored_record(inputs.model),
            "tokenizer": inputs.tokenizer_identity,
            "documents": inputs.documents.describe(),
            "versions": versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **(inputs.notes or {}),
        },
    }
    if before:
        content["provenance"] = before["provenance"]
    text = card(path.name, inputs.arrays, amount.lines(), content)
    if not exists or planner.holds():  # else another process has taken over, and plans the rest
        create(path, planner.folder, plan, corpus, inputs.arrays, amount.to_json(), content, text)
    return amount


def _size(inputs: PlanInputs, corpus: TokenizedCorpus, plan: Plan) -> Estimate:
    """Return the size of a plan; of one that grows, the documents and sequences that begin in its units."""
    amount = estimate_size(inputs, corpus, plan, plan.n_rows)
    if plan.stop_unit is None:
        return amount
    documents, sequences = (
        int(np.searchsorted(np.cumsum(rows, dtype=np.int64) - rows, plan.n_rows))
        for rows in (corpus.rows, corpus.segmentation.kept)
    )
    tokens = int(corpus.lengths[:documents].sum(dtype=np.int64))
    return replace(amount, documents=documents, sequences=sequences, tokens=tokens)


def _rows_planned(path: StoreLocation) -> int:
    """Return the number of rows in the plan of the store at *path*; 0 if there is none."""
    return int(read_attributes(path)["plan"]["rows"]) if (path / "zarr.json").exists() else 0
