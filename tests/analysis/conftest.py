"""Stores for analysis tests: one of arrays that counts reads, and a real one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flexcache
from flexcache.spec import CaptureSpec


class ArrayStore:
    """Minimal store for an analysis, over arrays in memory: (layer, row, hidden) or (row, hidden)."""

    def __init__(self, values: np.ndarray, counts: Any, rows: str = "all", **columns: Any) -> None:
        self.values = {"resid_post" if values.ndim == 3 else "model.norm": values.astype(np.float32)}
        self.spec = CaptureSpec(rows=rows)
        self.reads: list[tuple[int | None, int]] = []
        counts = np.asarray(counts, np.int64)
        self.documents = pa.table(
            {
                "id": [f"d{i}" for i in range(len(counts))],
                "n_tokens": counts.astype(np.int32),
                **columns,
                "row_start": np.cumsum(counts) - counts,
                "n_rows": counts,
            }
        )

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.values)

    def layers(self, site: str) -> tuple[int, ...]:
        values = self.values[site]
        return tuple(range(len(values))) if values.ndim == 3 else ()

    def read(self, site: str, layer: int | None = None, rows: Any = slice(None)) -> np.ndarray:
        found = self.values[site][rows] if layer is None else self.values[site][layer][rows]
        self.reads.append((layer, len(found)))
        return found

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {name: np.array(self.documents[name].to_pylist()) for name in self.documents.column_names}


def sentiment(
    n: int = 120, layers: int = 3, hidden: int = 7, seed: int = 0, classes: int = 2, **more: Any
) -> ArrayStore:
    """Return a store of documents with 1 to 5 rows; from layer 1 on, their label is in every row, under noise."""
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=n)
    counts = rng.integers(1, 6, size=n)
    values = rng.normal(size=(layers, counts.sum(), hidden))
    values[1:] += 1.2 * np.eye(classes, hidden)[np.repeat(label, counts)]
    words = np.array(["bright not dull", "dull not bright", "not bright dull"])  # only pairs of words tell
    shown = np.where(rng.random(n) < 0.3, rng.integers(classes, size=n), label)
    columns = {
        "text": [f"{words[v]} number {i}" for i, v in enumerate(shown)],
        "label": [["neg", "pos", "neutral"][v] for v in label],
        "score": 2.0 * label - 1 + rng.normal(size=n),
        "group": [f"g{i // 3}" for i in range(n)],
        **more,
    }
    return ArrayStore(values, counts, **columns)


@pytest.fixture(scope="session")
def array_store() -> type[ArrayStore]:
    return ArrayStore


@pytest.fixture(scope="session")
def make_store() -> Any:
    return sentiment


@pytest.fixture
def store() -> ArrayStore:
    return sentiment()


EVIL = r"<script>alert('label & co')</script> $\q$"


@pytest.fixture(scope="session")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    """Return a store on disk, filled through the public recorder without a model; its names are hostile."""
    rng = np.random.default_rng(0)
    documents = [
        {
            "id": f"d{i}",
            "text": " ".join(["good" if i % 2 else "bad"] * (1 + i % 4)),
            EVIL: f"<b>{'pos' if i % 2 else 'neg'}</b> $x",
        }
        for i in range(60)
    ]
    path: Path = tmp_path_factory.mktemp("stores") / "run & <co>.zarr"
    with flexcache.record(
        path,
        documents,
        sites={"resid_post": (3, 5)},
        model=f"model {EVIL}",
        layers=[0, 2],
        dtype="float32",
        tokenizer=lambda texts: [[len(word) for word in text.split()] for text in texts],
    ) as recorder:
        table = recorder.store.documents
        positive = np.array([value == "<b>pos</b> $x" for value in table[EVIL].to_pylist()])
        sign = np.repeat(np.where(positive, 1, -1), table["n_rows"].to_numpy())
        for batch in recorder.batches():
            for layer in (0, 2):
                values = rng.normal(size=(len(batch.rows), 5))
                values[:, 0] += layer * sign[batch.rows]
                recorder.put("resid_post", values, rows=batch.rows, layer=layer)
    return flexcache.open(path)
