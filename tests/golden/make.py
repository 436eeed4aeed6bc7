"""Makes the golden stores of the present schema: tiny stores of every kind, kept for every later version to read.

    python -m tests.golden.make

writes ``tests/golden/<schema>-<kind>.zarr``. Those of an older schema are never made again: they are what that version
wrote. Values are a function of row, layer and feature, so that no copy of them is needed: see `value`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import flexcache
from flexcache.store.schema import SCHEMA

FOLDER = Path(__file__).parent
DOCUMENTS: list[dict[str, Any]] = [
    {
        "id": f"d{i}",
        "tokens": [(3 * i + j) % 97 for j in range(2 + i % 5)],
        "label": ["no", "yes"][i % 2],
        "grade": i / 4,
    }
    for i in range(12)
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"sites": {"resid_post": (3, 4)}, "layers": [0, 2], "dtype": "bfloat16"},
    "path": {"sites": {"model.norm": 4}, "dtype": "float32"},
    "float16": {"sites": {"resid_post": (2, 4), "mlp_post": (2, 6)}, "dtype": "float16"},
    "zstd": {"sites": {"resid_post": (2, 4)}, "dtype": "bfloat16", "compression": "zstd"},
    "mean": {"sites": {"resid_post": (2, 4)}, "dtype": "float32", "rows": "mean"},
    "last": {"sites": {"resid_post": (2, 4)}, "dtype": "float32", "rows": "last"},
}


def value(rows: np.ndarray, layer: int, features: int) -> np.ndarray:
    """What a golden store holds: numbers that bfloat16 holds exactly."""
    return ((rows[:, None] * 7 + layer * 5 + np.arange(features)) % 64 - 32) / 4.0


def make(kind: str, path: Path) -> None:
    settings = KINDS[kind]
    with flexcache.record(path, DOCUMENTS, model="golden", batch_tokens=16, **settings) as recorder:
        for batch in recorder.batches():
            rows = np.asarray(batch.rows)
            for site, shape in settings["sites"].items():
                if isinstance(shape, int):
                    recorder.put(site, value(rows, 0, shape), rows=batch.rows)
                    continue
                for layer in settings.get("layers", range(shape[0])):
                    recorder.put(site, value(rows, layer, shape[1]), rows=batch.rows, layer=layer)


def main() -> None:
    for kind in KINDS:
        path = FOLDER / f"{SCHEMA}-{kind}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        make(kind, path)
        shutil.rmtree(path / "runs", ignore_errors=True)  # timings
        content = json.loads((path / "zarr.json").read_text())
        print(path.name, content["attributes"]["flexcache"]["schema"])


if __name__ == "__main__":
    main()
