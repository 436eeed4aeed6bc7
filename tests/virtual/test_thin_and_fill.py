"""Layers that become virtual, and virtual layers that are written to disk, against captures that keep the same."""

from __future__ import annotations

import os
import shutil
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

import flexcache
from flexcache.errors import ConfigError, FlexCacheError, MismatchError, SiteError, StoreError
from flexcache.store.format.shard import shard_name
from flexcache.store.manage.layer_change import NOTE, LayerChange
from flexcache.store.write.election import working
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes
from tests.reliability.commands import content
from tests.reliability.forked import fork
from tests.reliability.steps import BROKEN, FULL, killed

SITES = ["resid_post", "mlp_post", "z"]
KEEP = {"resid_post": [1]}
DOCUMENTS = token_documents(lengths(40, longest=12), vocabulary=VOCABULARY)
CAPTURE: dict[str, Any] = {"sites": SITES, "batch_tokens": 40, "progress": False}
TRIES = 6
"""Steps tried by default; the marker `slow` tries every one."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory if there is one, with a full store, and one whose layers are virtual but one."""
    memory = Path("/dev/shm")
    path = Path(mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    torch.set_num_threads(1)
    flexcache.capture(tiny("llama"), None, DOCUMENTS, path / "full", **CAPTURE)
    flexcache.capture(tiny("llama"), None, DOCUMENTS, path / "virtual", keep=KEEP, **CAPTURE)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a store."""
    return lambda name: Path(shutil.copytree(folder / name, tmp_path / "run.zarr"))


def check_same(found: Path, expected: Path) -> None:
    """Check that two stores are equal, but for their history."""
    one, other = flexcache.open(found), flexcache.open(expected)
    assert one.arrays == other.arrays
    assert one.spec == other.spec
    assert [*one.ledger] == [*other.ledger]
    assert shard_hashes(found) == shard_hashes(expected)
    assert flexcache.verify(found).sound


def test_a_thinned_store_is_that_of_a_capture_which_keeps_the_same_layers(folder: Path, made: Any) -> None:
    path = made("full")
    thinning = flexcache.Thinning(path, KEEP)
    before, needless = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), thinning.bytes()
    store = thinning.run(tiny("llama"))
    check_same(path, folder / "virtual")
    assert store.provenance.history[-1]["thinned"]["mlp_post"] == [0, 1, 2, 3]
    assert before - sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) > 0.9 * needless > 0
    capture = {**CAPTURE, "keep": KEEP}
    assert flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **capture).arrays == store.arrays, "it is resumed"


def test_a_filled_store_is_that_of_a_capture_which_keeps_everything(folder: Path, made: Any) -> None:
    path = made("virtual")
    filling = flexcache.Filling(path)
    assert filling.bytes() == sum(
        (folder / "full" / shard_name(*key, unit)).stat().st_size for key in filling.keys for unit in range(3)
    )
    filling.run(tiny("llama"))
    check_same(path, folder / "full")


def test_some_layers_are_filled_and_made_virtual_again(folder: Path, made: Any) -> None:
    path = made("virtual")
    store = flexcache.fill(path, tiny("llama"), {"mlp_post": [2], "z": "1:3"})
    assert (store.layers("mlp_post"), store.layers("z"), store.layers("resid_post")) == ((2,), (1, 2), (1,))
    full = flexcache.open(folder / "full")
    assert np.array_equal(store.read("mlp_post", 2, raw=True), full.read("mlp_post", 2, raw=True))
    assert store.spec.keep == {"resid_post": [1], "mlp_post": [2], "z": [1, 2]}
    assert flexcache.verify(path).sound
    flexcache.thin(path, tiny("llama"), KEEP)
    check_same(path, folder / "virtual")


def test_every_second_residual_is_kept(made: Any) -> None:
    store = flexcache.thin(made("full"), tiny("llama"), "every 2")
    assert store.layers("resid_post") == (1, 3)
    assert store.spec.keep == {"resid_post": "every 2"}


def test_a_cache_that_holds_few_layers_changes_nothing(folder: Path, made: Any) -> None:
    path = made("full")
    flexcache.Thinning(path, KEEP).run(tiny("llama"), cache_bytes=400_000)
    flexcache.Filling(path).run(tiny("llama"), cache_bytes=400_000)
    check_same(path, folder / "full")


def test_nothing_changes_if_the_rows_are_not_recomputed_to_the_bit(folder: Path, made: Any) -> None:
    path = made("full")
    for unit in (0, 1):
        shard = path / shard_name("z", 3, unit)
        damaged = bytearray(shard.read_bytes())
        damaged[5] ^= 1
        shard.write_bytes(damaged)
    before = content(path)
    with pytest.raises(MismatchError, match="does not recompute their rows to the bit") as caught:
        flexcache.thin(path, tiny("llama"), KEEP)
    assert "z of layer 3" in str(caught.value)
    assert content(path) == before
    assert flexcache.open(path).arrays == flexcache.open(folder / "full").arrays


def test_another_model_is_refused(folder: Path, made: Any, tmp_path: Path) -> None:
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(MismatchError):
        flexcache.thin(made("full"), other, KEEP)
    with pytest.raises(MismatchError):
        flexcache.fill(shutil.copytree(folder / "virtual", tmp_path / "virtual"), other, "z")


def disturbed(folder: Path, name: str, change: Callable[[Path], object], tries: int) -> Iterator[Path]:
    """Yield a store after its change was killed or refused at each of some steps, then after it was repeated."""
    work = folder / "work"
    shutil.copytree(folder / name, work)
    undisturbed = fork(lambda: change(work), folder)
    assert not undisturbed.error + undisturbed.failure, undisturbed
    expected, count = content(work), len(undisturbed.steps)
    shutil.rmtree(work)
    for number, at in enumerate(sorted({round(i * (count - 1) / (min(tries, count) - 1)) for i in range(tries)})):
        how = (killed, FULL, BROKEN)[number % 3]
        shutil.copytree(folder / name, work)
        outcome = fork(lambda: change(work), folder, at, how)
        assert not outcome.failure, outcome.failure
        yield work
        again = fork(lambda: change(work), folder)
        assert not again.error + again.failure, (at, undisturbed.steps[at], again)
        assert content(work) == expected, (at, undisturbed.steps[at], how)
        assert flexcache.verify(work).sound
        shutil.rmtree(work)


@pytest.mark.parametrize("tries", [TRIES, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["full", "virtual"])
def test_a_change_that_is_killed_or_refused_at_any_step_loses_nothing(folder: Path, name: str, tries: int) -> None:
    def change(path: Path) -> None:
        torch.set_num_threads(1)
        change_layers(path, name)

    full = flexcache.open(folder / "full")
    digests = {
        shard: held for record in flexcache.open(folder / "virtual").ledger for shard, held in record.virtual.items()
    }
    for path in disturbed(folder, name, change, tries):
        store = flexcache.open(path)
        assert store.complete
        records = {record.unit: record for record in store.ledger}
        for array in store.arrays.values():
            for layer in array.slices:
                assert np.array_equal(store.read(array.name, layer, raw=True), full.read(array.name, layer, raw=True))
            for layer in array.virtual:
                for unit in range(store.n_units):
                    shard = shard_name(array.name, layer, unit)
                    assert records[unit].virtual[shard] == digests[shard]
        assert flexcache.verify(path).sound or (path / NOTE).exists()


def change_layers(path: Path, name: str) -> None:
    """Thin the full store, or fill the virtual one; a change that is finished is not repeated."""
    store = flexcache.open(path)
    if name == "full" and ((path / NOTE).exists() or store.layers("z")):
        flexcache.thin(path, tiny("llama"), KEEP)
    elif name == "virtual" and ((path / NOTE).exists() or store.arrays["z"].virtual):
        flexcache.fill(path, tiny("llama"))


def test_the_digests_of_the_ledger_are_those_of_the_stored_rows(folder: Path, made: Any) -> None:
    store, full = flexcache.thin(made("full"), tiny("llama"), KEEP), flexcache.open(folder / "full")
    table = full.tokens.to_pandas()
    for unit, lines in table.groupby("unit"):
        record = store.ledger.read_record(int(unit))
        ends = lines.groupby("batch", sort=False).apply(
            lambda some: (int(some["row_start"].min()), int((some["row_start"] + some["n_rows"]).max()))
        )
        rows = [xxhash.xxh3_128_hexdigest(full.read("z", 2, slice(*span), raw=True).tobytes()) for span in ends]
        assert list(record.virtual[shard_name("z", 2, int(unit))]) == rows


@pytest.mark.parametrize("name", ["full", "virtual"])
def test_two_processes_share_a_change(folder: Path, name: str) -> None:
    path = Path(shutil.copytree(folder / name, folder / f"shared-{name}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which are not used after it
        children: list[int] = []
        for _ in range(2):
            if not (pid := os.fork()):
                try:
                    torch.set_num_threads(1)
                    move = flexcache.Thinning(path, KEEP) if name == "full" else flexcache.Filling(path)
                    move.run(tiny("llama"))
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    check_same(path, folder / ("virtual" if name == "full" else "full"))


def test_a_change_that_another_process_applies_is_waited_for(made: Any) -> None:
    path = made("full")
    change, freed = LayerChange(path, "remove", (("z", 0),)), list[int]()
    with working(path) as (_, claims):
        assert claims.take_claim(["change"])
        with pytest.raises(StoreError, match="another process"):
            change.run()
        waiting = threading.Thread(target=lambda: freed.append(change.run(shared=True)))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
        assert claims.holds("change"), "whoever fails or waits leaves the claims of others"
        change._apply(lambda done, total: None)
    waiting.join(timeout=20)
    assert freed == [0]
    assert flexcache.verify(path).sound
    assert not (path / ".claims").exists()


# Errors


def test_what_cannot_be_changed_is_refused_before_any_work(folder: Path, made: Any, tmp_path: Path) -> None:
    path = made("full")
    with pytest.raises(SiteError, match="no layer would become virtual"):
        flexcache.Thinning(path, dict.fromkeys(SITES, "all"))
    with pytest.raises(SiteError, match="all of these layers are on disk"):
        flexcache.Filling(path, "z")
    with pytest.raises(ConfigError, match="not captured"):
        flexcache.Thinning(path, {"q": "all"})
    with pytest.raises(SiteError, match="virtual already"):
        flexcache.Thinning(folder / "virtual", {"resid_post": [1, 2]})
    last = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "last", rows="last", progress=False)
    with pytest.raises(ConfigError, match="rows"):
        flexcache.Thinning(last.path, KEEP)
    flexcache.repair(path)
    (path / "ledger" / "0" / "1.json").unlink()
    for plan in (lambda: flexcache.Thinning(path, KEEP), lambda: flexcache.Filling(path)):
        with pytest.raises(StoreError, match="incomplete"):
            plan()


def test_another_change_is_refused_until_an_interrupted_one_is_finished(folder: Path) -> None:
    work = folder / "other"
    shutil.copytree(folder / "full", work)
    steps = fork(lambda: flexcache.thin(work, tiny("llama"), KEEP), folder).steps
    shutil.rmtree(work)
    shutil.copytree(folder / "full", work)
    fork(lambda: flexcache.thin(work, tiny("llama"), KEEP), folder, len(steps) - 30, killed)
    assert (work / NOTE).exists()
    assert any("flexcache thin" in finding.problem for finding in flexcache.verify(work).findings)
    for change in (lambda: flexcache.Filling(work), lambda: flexcache.Removal(work, ["z"])):
        with pytest.raises(StoreError, match="interrupted") as caught:
            change()
        assert "flexcache thin" in str(caught.value)
    with pytest.raises(FlexCacheError):
        flexcache.Removal(work, ["z"])
    flexcache.thin(work, tiny("llama"), KEEP)
    check_same(work, folder / "virtual")
