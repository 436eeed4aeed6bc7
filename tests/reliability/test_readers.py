"""Readers always see a consistent store while another process captures and extends it."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import xarray as xr

import flexcache
from tests.corpora import activation
from tests.reliability.commands import MORE, NEW, OLD, fill, lost

PAUSE = 0.01
"""Seconds that each put takes, so that there is time to look."""


def write(path: str) -> None:
    """Capture, extend by documents and extend by sites, slowly."""
    put = flexcache.Recorder.put

    def slow(*arguments: object, **options: object) -> None:
        time.sleep(PAUSE)
        put(*arguments, **options)  # type: ignore[arg-type]

    with patch.object(flexcache.Recorder, "put", slow):
        fill(Path(path), OLD)
        fill(Path(path), NEW, extend=True)
        fill(Path(path), OLD, extend=True, **MORE)


def check(store: flexcache.Store) -> tuple[int, int, int]:
    """Read all committed rows; return their number."""
    rows = store.committed_rows
    at = {name: np.asarray(variable.values) for name, variable in store.coordinates.items()}
    assert len(at["token_id"]) == store.n_rows
    assert store.documents.column("n_rows").to_numpy().sum() == store.n_rows
    assert store.tokens.column("n_rows").to_numpy().sum() == store.n_rows
    for name, array in store.arrays.items():
        for layer in array.slices:
            expected = activation(at["token_id"][rows], at["position"][rows], layer or 0, array.features)
            found = store.read(name, layer, rows)
            assert np.array_equal(found, expected.astype(store.raw(name).dtype).astype(np.float32))
    return store.n_rows, len(rows), sum(len(array.slices) for array in store.arrays.values())


def check_foreign(path: Path) -> None:
    """A reader that does not know the ledger sees NaN for rows that are not captured, and right values elsewhere."""
    with xr.open_zarr(path) as dataset:
        token_id, position = dataset["token_id"].values, dataset["position"].values
        found = dataset["resid_post"][3].values
    expected = activation(token_id, position, 3, found.shape[1]).astype(found.dtype)
    there = ~np.isnan(found.astype(np.float32)).all(axis=1)
    assert np.array_equal(found[there], expected[there])


def test_readers_always_see_a_whole_store_while_another_process_fills_and_extends_it(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(str(path),))
    writer.start()
    seen, first = set(), None
    while writer.is_alive():
        if not (path / "zarr.json").exists():
            time.sleep(0.01)
            continue
        first = first or flexcache.open(path)
        seen.add(check(flexcache.open(path)))
        first.refresh()
        check(first)
        check_foreign(path)
    writer.join()
    assert writer.exitcode == 0
    last = check(flexcache.open(path))
    assert not lost(path)
    assert first is not None
    assert first.complete
    assert len({committed for _, committed, _ in seen}) > 2, "nobody looked while it was captured"
    assert len({rows for rows, _, _ in seen | {last}}) == 2, "nobody looked before it was extended"
    assert len({layers for _, _, layers in seen | {last}}) == 2
