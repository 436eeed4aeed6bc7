"""A store is captured, extended, copied, reduced, damaged and repaired in any order, with kills at any step.

Hypothesis draws the operations; a model of documents, sites and layers gives the expected content, and numpy each
expected value. A kill is a SIGKILL of a process that was forked for the operation, before any of its steps on the file
system; the same operation is then repeated, and possibly killed again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import flexcache
from flexcache.store.manage.copy import copy
from flexcache.store.manage.extension_transaction import ExtensionTransaction
from flexcache.store.manage.layer_change import NOTE
from flexcache.store.manage.remove import Removal
from tests.corpora import activation, token_documents
from tests.reliability.commands import UNSTABLE, fill
from tests.reliability.forked import fork
from tests.reliability.steps import killed
from tests.reliability.test_damage import flip, truncate

FEATURES = {"resid_post": 6, "mlp_out": 4, "attn_out": 5}
DEPTH = 5
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip": flip,
    "truncate": truncate,
    "remove": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}
CORPUS = st.lists(st.integers(1, 25), min_size=1, max_size=60)
KILL = st.none() | st.integers(0, 300)
"""The step before which an operation is killed; it ends where it has fewer."""


@dataclass(frozen=True)
class Model:
    """Expected content of a store, and the options that give it."""

    documents: tuple[dict[str, Any], ...]
    first: tuple[dict[str, Any], ...]
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    rows: str
    compression: str

    def options(self) -> dict[str, Any]:
        return {
            "sites": {site: (DEPTH, FEATURES[site]) for site in self.sites},
            "layers": list(self.layers),
            "rows": self.rows,
            "compression": self.compression,
        }

    def agrees(self, store: flexcache.Store) -> bool:
        """Return True if a store has these documents, sites and layers, and each document its tokens."""
        if {site: store.layers(site) for site in store.sites} != dict.fromkeys(self.sites, self.layers):
            return False
        ids, tokens = store.documents.column("id").to_pylist(), np.asarray(store.coordinates["token_id"].values)
        by_id = {document["id"]: document["tokens"] for document in self.documents}
        kept = slice(None) if self.rows == "all" else slice(-1, None)
        return sorted(ids) == sorted(by_id) and all(
            tokens[store.rows(number)].tolist() == by_id[name][kept] for number, name in enumerate(ids)
        )


@dataclass(frozen=True)
class Doing:
    """An operation that can be repeated, with the content and location of the store after it."""

    kind: str
    call: Callable[[], object]
    after: Model
    path: Path


@dataclass(frozen=True)
class Reader:
    """A store that was opened earlier, and the rows that it had."""

    store: flexcache.Store
    token_id: np.ndarray
    position: np.ndarray


def expected(token_id: np.ndarray, position: np.ndarray, site: str, layer: int) -> np.ndarray:
    return activation(token_id, position, layer, FEATURES[site]).astype(ml_dtypes.bfloat16).astype(np.float32)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
        self.path = self.folder / "0.zarr"
        self.model: Model | None = None
        self.doing: Doing | None = None
        self.broken: set[int] = set()
        self.readers: list[Reader] = []
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # Operations

    @initialize(
        corpus=CORPUS, rows=st.sampled_from(["all", "last"]), compression=st.sampled_from(["none", "zstd"]), kill=KILL
    )
    def capture(self, corpus: list[int], rows: str, compression: str, kill: int | None) -> None:
        documents = self._documents(corpus)
        model = Model(documents, documents, ("resid_post",), (1, 3), rows, compression)
        path = self.path
        self._do(Doing("capture", lambda: fill(path, list(documents), **model.options()), model, path), kill)

    @rule(kill=KILL)
    def go_on(self, kill: int | None) -> None:
        if self.doing is not None:
            self._do(self.doing, kill)

    @rule(corpus=CORPUS, kill=KILL)
    def extend_by_documents(self, corpus: list[int], kill: int | None) -> None:
        new, before, path = self._documents(corpus), self._held(), self.path
        model = replace(before, documents=before.documents + new)
        self._do(Doing("extend", lambda: fill(path, list(new), extend=True, **before.options()), model, path), kill)

    @rule(layers=st.sets(st.integers(0, DEPTH - 1), min_size=1), site=st.sampled_from([*FEATURES]), kill=KILL)
    def extend_by_layers_or_a_site(self, layers: set[int], site: str, kill: int | None) -> None:
        before, path = self._held(), self.path
        if site in before.sites:
            model = replace(before, layers=tuple(sorted({*before.layers, *layers})))
        else:
            model = replace(before, sites=(*before.sites, site))
        self._do(
            Doing("extend", lambda: fill(path, list(model.first), extend=True, **model.options()), model, path), kill
        )

    @rule()
    def drop_the_extension(self) -> None:
        extension = ExtensionTransaction(self.path)
        if self.doing is not None and extension.staged and not extension.committing:
            assert extension.discard()
            self.doing = None

    @rule(which=st.integers(0, DEPTH), kill=KILL)
    def remove_a_layer(self, which: int, kill: int | None) -> None:
        before, path = self._held(), self.path
        if len(before.layers) == 1:
            return
        layer = before.layers[which % len(before.layers)]
        model = replace(before, layers=tuple(other for other in before.layers if other != layer))

        def remove() -> None:
            if (path / NOTE).exists() or layer in flexcache.open(path).layers(before.sites[0]):
                Removal(path, None, layer).run()

        self._do(Doing("remove", remove, model, path), kill)

    @rule(compression=st.sampled_from(["none", "zstd"]), kill=KILL)
    def copy_and_go_on_there(self, compression: str, kill: int | None) -> None:
        self.count += 1
        model, target = replace(self._held(), compression=compression), self.folder / f"{self.count}.zarr"
        path = self.path
        self._do(Doing("copy", lambda: copy(path, target, compression=compression), model, target), kill)

    @rule(unit=st.integers(0, 99), site=st.integers(0, 9), layer=st.integers(0, 9), damage=st.sampled_from([*DAMAGES]))
    def damage(self, unit: int, site: int, layer: int, damage: str) -> None:
        model, path, store = self._held(), self.path, flexcache.open(self.path)
        unit %= store.n_units
        name = f"{model.sites[site % len(model.sites)]}/c/{model.layers[layer % len(model.layers)]}/{unit}/0"
        DAMAGES[damage](path / name)
        assert [(finding.file, finding.unit) for finding in flexcache.verify(path).findings] == [(name, unit)]
        self.broken = {unit}
        self.readers.clear()  # their mapped files may be the damaged ones

        def repair() -> None:
            flexcache.repair(path)
            fill(path, list(model.first), **model.options())

        self.doing = Doing("repair", repair, model, path)

    @rule()
    def open_and_keep(self) -> None:
        self._held()
        store = flexcache.open(self.path)
        token_id, position = (np.asarray(store.coordinates[name].values) for name in ("token_id", "position"))
        self.readers = [*self.readers[-3:], Reader(store, token_id, position)]

    # Invariants

    @invariant()
    def everything_reads_as_it_must(self) -> None:
        if not (self.path / "zarr.json").exists():
            assert self.model is None, "the store is gone"
            return
        store = flexcache.open(self.path)
        models = [model for model in (self.model, self.doing.after if self.doing else None) if model is not None]
        assert any(model.agrees(store) for model in models)
        assert self.doing or store.complete
        units = [unit for unit in store.committed_units.tolist() if unit not in self.broken]
        rows = np.array([row for unit in units for row in store.reader(store.sites[0]).layout.rows(unit)], np.int64)
        token_id, position = (np.asarray(store.coordinates[name].values)[rows] for name in ("token_id", "position"))
        for site in store.sites:
            for layer in store.layers(site):
                assert np.array_equal(store.read(site, layer, rows), expected(token_id, position, site, layer))

    @invariant()
    def whoever_has_it_open_reads_what_was_there(self) -> None:
        if not (self.path / "zarr.json").exists():
            return
        now = flexcache.open(self.path)
        for reader in self.readers:
            for site in reader.store.sites:
                for layer in {*reader.store.layers(site)} & {*(now.layers(site) if site in now else ())}:
                    found = reader.store.read(site, layer)
                    assert np.array_equal(found, expected(reader.token_id, reader.position, site, layer))

    @invariant()
    def nothing_is_damaged_that_nobody_damaged(self) -> None:
        if not (self.path / "zarr.json").exists():
            return
        findings = flexcache.verify(self.path).findings
        half = (*UNSTABLE, NOTE) if self.doing and self.doing.kind == "remove" else ()
        assert not [f for f in findings if f.unit not in self.broken and not f.stray and Path(f.file).name not in half]

    # Private

    def _held(self) -> Model:
        """Return the content of the store after finishing an unfinished operation."""
        self._finish()
        assert self.model is not None
        return self.model

    def _finish(self) -> None:
        if self.doing is not None:
            self._do(self.doing, None)

    def _documents(self, corpus: list[int]) -> tuple[dict[str, Any], ...]:
        self.count += 1
        documents = token_documents(corpus, seed=self.count)
        return tuple({**document, "id": f"{self.count}-{document['id']}"} for document in documents)

    def _do(self, doing: Doing, kill: int | None) -> None:
        self.doing = doing
        if kill is None:
            doing.call()
        else:
            outcome = fork(doing.call, self.folder, kill, killed)
            assert not outcome.error + outcome.failure, outcome.error + outcome.failure
            if outcome.killed:
                event(f"{doing.kind} killed")
                return
        event(doing.kind)
        if doing.path != self.path:
            shutil.rmtree(self.path)
            self.readers.clear()
        if doing.kind == "repair":
            self.broken.clear()
        self.model, self.path, self.doing = doing.after, doing.path, None


class TestAnyOrder(Machine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=10, stateful_step_count=10, deadline=None)


@pytest.mark.slow
class TestAnyOrderForLonger(Machine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
