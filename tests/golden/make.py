"""Makes the golden stores of the present schema: tiny stores of every kind, kept for every later version to read.

    python -m tests.golden.make [kind …]

writes ``tests/golden/<schema>-<kind>.zarr``. Those of an older schema are never made again: they are what that version
wrote. Values are a function of row, layer and feature, so that no copy of them is needed: see `value`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import flexcache
from flexcache.store.format.schema import OUTLIER_SCHEMA, SCHEMA, VIRTUAL_SCHEMA
from tests.corpora import plan_virtual

FOLDER = Path(__file__).parent
DOCUMENTS: list[dict[str, Any]] = [
    {
        "id": f"d{i}",
        "tokens": [(3 * i + j) % 97 for j in range(2 + i % 5)],
        "label": ["no", "yes"][i % 2],
        "grade": i / 4,
        "kinds": ["odd" if j % 2 else "even" for j in range(2 + i % 5)],
    }
    for i in range(12)
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"sites": {"resid_post": (3, 4)}, "layers": [0, 2], "dtype": "bfloat16"},
    "path": {"sites": {"model.norm": 4}, "dtype": "float32"},
    "float16": {"sites": {"resid_post": (2, 4), "mlp_post": (2, 6)}, "dtype": "float16"},
    "zstd": {"sites": {"resid_post": (2, 4)}, "dtype": "bfloat16", "compression": "zstd"},
    "mean": {"sites": {"resid_post": (2, 4)}, "dtype": "float32", "rows": "mean"},
    "extended": {"sites": {"resid_post": (3, 4)}, "layers": [0, 2], "dtype": "bfloat16"},
    "windows": {"sites": {"resid_post": (2, 4)}, "dtype": "float32", "windows": {"length": 4, "stride": 2}},
    "packed": {
        "sites": {"resid_post": (2, 4)},
        "dtype": "float32",
        "packing": {"length": 7, "separator": 96, "bos": 95},
    },
    "chosen": {"sites": {"resid_post": (2, 4)}, "dtype": "float32", "rows": {"every": 2}, "token_labels": ["kinds"]},
    "last": {"sites": {"resid_post": (2, 4)}, "dtype": "float32", "rows": "last"},
}
INT8: dict[str, Any] = {"sites": {"resid_post": (2, 4), "model.norm": 4}, "dtype": "int8"}
"""Stores of schema 1 have no outliers, and were written by the version before schema 2."""


VIRTUAL: dict[str, tuple[int, int]] = {"resid_post": (3, 4), "mlp_post": (3, 6)}
KEEP: dict[str, Any] = {"resid_post": [0, 2]}


def value(rows: np.ndarray, layer: int, features: int) -> np.ndarray:
    """What a golden store holds: numbers that bfloat16 holds exactly."""
    return ((rows[:, None] * 7 + layer * 5 + np.arange(features)) % 64 - 32) / 4.0


def make(kind: str, path: Path) -> None:
    settings = INT8 if kind == "int8" else KINDS[kind]
    if kind != "extended":
        fill(path, DOCUMENTS, **settings)
        return
    fill(path, DOCUMENTS[:7], **{**settings, "layers": [0]})
    fill(path, DOCUMENTS[7:], **{**settings, "layers": [0]})
    fill(path, DOCUMENTS[:7], **settings)


def fill(path: Path, documents: list[dict[str, Any]], **settings: Any) -> None:
    options = {"model": "golden", "batch_tokens": 16, "extend": True, **settings}
    with flexcache.record(path, documents, **options) as recorder:
        for batch in recorder.batches():
            for site, layer in recorder.keys:
                rows = value(np.asarray(batch.rows), layer or 0, recorder.store.arrays[site].features)
                recorder.put(site, rows, rows=batch.rows, layer=layer)


def make_virtual(path: Path, documents: list[dict[str, Any]] = DOCUMENTS) -> None:
    """Make the store with virtual layers: a residual stream with two of three layers on disk, and neurons with none."""
    plan_virtual(path, documents, VIRTUAL, KEEP, batch_tokens=16)
    with flexcache.Recorder(path) as recorder:
        for batch in recorder.batches():
            for site, layer in recorder.keys:
                rows = value(np.asarray(batch.rows), layer or 0, recorder.store.arrays[site].features)
                recorder.put(site, rows, rows=batch.rows, layer=layer)


def main(*kinds: str) -> None:
    schemas = {"int8": OUTLIER_SCHEMA, "virtual": VIRTUAL_SCHEMA}
    for kind in kinds or [*KINDS, *schemas]:
        path = FOLDER / f"{schemas.get(kind, SCHEMA)}-{kind}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        if kind == "virtual":
            make_virtual(path)
        else:
            make(kind, path)
        shutil.rmtree(path / "runs", ignore_errors=True)  # timings
        content = json.loads((path / "zarr.json").read_text())
        print(path.name, content["attributes"]["flexcache"]["schema"])


if __name__ == "__main__":
    main(*sys.argv[1:])
