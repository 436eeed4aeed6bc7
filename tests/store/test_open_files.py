"""Gathers of rows of many shards by one index, and the files that readers keep open."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flexcache
from flexcache.errors import DamagedError
from flexcache.store.read import shard_reader
from flexcache.store.storage.open_files import open_files
from tests.corpora import build_store, expected_rows, lengths, token_documents

WIDTHS = {"one": (5, 1), "odd": (5, 37), "page": (5, 1024)}
"""Features of a row: in float32, they are four bytes, a part of a page that does not divide it, and a page."""


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("wide") / "run.zarr"
    return build_store(path, token_documents(lengths(260)), sites=WIDTHS, dtype=request.param)


@pytest.fixture
def store(tmp_path: Path) -> flexcache.Store:
    return build_store(tmp_path / "run.zarr", token_documents(lengths(260)), dtype="float32")


def files_of(store: flexcache.Store) -> list[str]:
    """Open and mapped files of a store in this process."""
    held = []
    for number in os.listdir("/proc/self/fd"):
        try:
            held.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    held += [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [name for name in held if name.startswith(str(store.path))]


@pytest.mark.parametrize("together", [1, 2, 128])
@given(data=st.data())
def test_rows_of_any_shards_in_any_order_are_those_written(
    wide: flexcache.Store, together: int, data: st.DataObject
) -> None:
    site = data.draw(st.sampled_from(sorted(WIDTHS)))
    rows = np.array(data.draw(st.lists(st.integers(0, wide.n_rows - 1), max_size=50)), np.int64)
    reader = wide.reader(site)
    expected = expected_rows(wide, 3, reader.array.features)[rows].astype(reader.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_reader, "TOGETHER", together)
        for raw in (True, False):
            found = wide.read(site, 3, rows, raw=raw)
            assert found.dtype == (reader.dtype if raw else np.float32)
            assert found.flags.writeable
            assert np.array_equal(found, expected.astype(found.dtype))


def test_a_row_outside_of_the_store_is_never_read_from_a_map(wide: flexcache.Store) -> None:
    for row in (-1, wide.n_rows, wide.n_units * wide.shard_rows):
        with pytest.raises(IndexError, match="row numbers"):
            wide.reader("odd").gather(0, np.array([0, row]), raw=True)


def test_threads_that_gather_while_maps_are_given_up_read_the_right_rows(
    wide: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "most", 1)
    expected = {site: expected_rows(wide, 0, features) for site, (_, features) in WIDTHS.items()}

    def gather(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            site, rows = rng.choice(sorted(WIDTHS)), rng.integers(0, wide.n_rows, 64)
            values = expected[site][rows].astype(wide.reader(site).dtype)
            assert np.array_equal(wide.read(site, 0, rows, raw=True), values)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(gather, range(4)))


def test_the_files_that_all_stores_keep_open_are_bounded(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "most", 3)
    stores = [store, flexcache.open(store.path)]
    assert store.n_units > 3
    for one in stores:
        for site, layer in (("resid_post", 0), ("resid_post", 3), ("model.embed", None)):
            one.read(site, layer, np.arange(0, one.n_rows, 7))
            one.read(site, layer)
            assert sum(1 for _ in one.scan(site, layer))
    assert 0 < len(files_of(store)) <= 6, "three maps, each with its descriptor, at most"


def test_a_store_that_is_dropped_or_closed_keeps_no_file_open(store: flexcache.Store) -> None:
    other = flexcache.open(store.path)
    for one in (store, other):
        one.read("resid_post", 0, [1, store.n_rows - 1])
        one.read("resid_post", 0)
    store.reader("resid_post").close()
    assert files_of(store)
    del one, other
    gc.collect()
    assert not files_of(store)


@pytest.mark.parametrize("change", ["cut", "missing", "replaced"])
def test_a_scan_sees_that_a_file_changed_between_its_blocks(store: flexcache.Store, change: str) -> None:
    shard = store.path / "resid_post" / "c" / "0" / "0" / "0"
    expected = store.read("resid_post", 0, slice(0, 20))
    blocks = store.scan("resid_post", 0, block_bytes=10 * 24 * 4)
    assert np.array_equal(next(blocks)[1], expected[:10])
    if change == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif change == "missing":
        shard.unlink()
    else:
        copy = shard.with_name("copy")
        shutil.copy(shard, copy)
        with copy.open("r+b") as file:
            file.seek(10 * 24 * 4)
            file.write(np.full(24, 7, np.float32).tobytes())
        copy.replace(shard)
        assert (next(blocks)[1][0] == 7).all()
        return
    with pytest.raises(DamagedError, match="resid_post/c/0/0/0"):
        next(blocks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_a_thread_opens_a_file_can_read(store: flexcache.Store) -> None:
    expected = store.read("resid_post", 0, [0, 1])
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with open_files._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork among threads, which is the case here
        child = os.fork()
    if not child:
        right = False
        try:
            threading.Timer(20, os._exit, [1]).start()
            right = np.array_equal(store.read("resid_post", 0, [0, 1]), expected)
        finally:
            os._exit(not right)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
