"""The commands that create or change stores, each of which can be repeated, with their start and expected result.

Values are those of `tests.corpora.activation`, so that every row of every store can be recomputed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import flexcache
from flexcache.exchange.exporting import export
from flexcache.exchange.importing import import_folder
from flexcache.store.manage.copy import copy
from flexcache.store.manage.layer_change import NOTE
from flexcache.store.manage.merge import merge
from flexcache.store.manage.remove import Removal
from flexcache.store.storage.backend import digest, relative_files
from tests.corpora import SITES, activation, lengths, open_recorder, padded_activation, token_documents

OLD = token_documents(lengths(90, longest=20))
NEW = [{**document, "id": f"new-{document['id']}"} for document in token_documents(lengths(70, 20, seed=5), seed=9)]
MORE: dict[str, Any] = {"sites": {**SITES, "mlp_out": (5, 24)}, "layers": [0, 1, 3, 4]}
OPTIONS: dict[str, Any] = {"batch_tokens": 64}
UNSTABLE = ("zarr.json", "README.md", "ledger/plan.json")
"""Files that contain the time at which a store was created; `flexcache.verify` checks them by their records."""


@dataclass(frozen=True)
class Command:
    """A command that creates or changes *target* in a folder, from the store ``base.zarr``.

    Attributes
    ----------
    prepare : callable
        Writes the initial state into the folder, given the base.
    run : callable
        The command itself.
    source : str
        Pattern of the files that it reads and must not change.
    """

    prepare: Callable[[Path, Path], object]
    run: Callable[[Path], object]
    target: str = "run.zarr"
    source: str = "none"


def fill(path: Path, documents: list[dict[str, Any]], **options: Any) -> None:
    with open_recorder(path, documents, **{**OPTIONS, **options}) as recorder:
        for batch in recorder.batches():
            for name, layer in recorder.keys:
                values = padded_activation(batch, layer or 0, recorder.store.arrays[name].features)
                recorder.put(name, batch.kept(values), rows=batch.rows, layer=layer)


def make_base(path: Path) -> Path:
    """Make the store that commands begin from."""
    fill(path, OLD)
    return path


def _copied(name: str) -> Callable[[Path, Path], object]:
    return lambda base, folder: shutil.copytree(base, folder / name)


def _parts(base: Path, folder: Path) -> None:
    copy(base, folder / "source-0.zarr", layers=[0], sites=["resid_post"])
    copy(base, folder / "source-1.zarr", layers=[3])


def _tensors(base: Path, folder: Path) -> None:
    ids = np.random.default_rng(2).integers(3, 257, size=(60, 12))
    values = {f"layer_{layer}": activation(ids, np.arange(12)[None], layer, 24) for layer in (0, 2)}
    (folder / "source").mkdir()
    save_file(
        {**{name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()}, "token_ids": ids},
        folder / "source" / "acts.safetensors",
    )


def _remove(folder: Path) -> None:
    path = folder / "run.zarr"
    if (path / NOTE).exists() or 0 in flexcache.open(path).layers("resid_post"):
        Removal(path, ["resid_post"], 0).run()


def _damaged(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder / "run.zarr")
    (folder / "run.zarr" / "resid_post/c/3/1/0").write_bytes(b"")


def _repair(folder: Path) -> None:
    flexcache.repair(folder / "run.zarr")
    fill(folder / "run.zarr", OLD)


def _import(folder: Path) -> None:
    import_folder(
        folder / "source", folder / "run.zarr", "safetensors", site="resid_post", token_ids="token_ids", depth=4
    )


COMMANDS: dict[str, Command] = {
    "capture": Command(lambda base, folder: None, lambda folder: fill(folder / "run.zarr", OLD)),
    "extend by documents": Command(_copied("run.zarr"), lambda folder: fill(folder / "run.zarr", NEW, extend=True)),
    "extend by sites": Command(_copied("run.zarr"), lambda folder: fill(folder / "run.zarr", OLD, extend=True, **MORE)),
    "repair": Command(_damaged, _repair),
    "rm": Command(_copied("run.zarr"), _remove),
    "copy": Command(
        _copied("source.zarr"), lambda folder: copy(folder / "source.zarr", folder / "run.zarr"), source="source*"
    ),
    "copy, converted": Command(
        _copied("source.zarr"),
        lambda folder: copy(folder / "source.zarr", folder / "run.zarr", dtype="float32", compression="zstd"),
        source="source*",
    ),
    "merge": Command(
        _parts,
        lambda folder: merge([folder / "source-0.zarr", folder / "source-1.zarr"], folder / "run.zarr"),
        source="source*",
    ),
    "import": Command(_tensors, _import, source="source*"),
    "export": Command(
        _copied("source.zarr"),
        lambda folder: export(folder / "source.zarr", folder / "out", "npy"),
        target="out",
        source="source*",
    ),
}


def content(folder: Path) -> dict[str, str]:
    """Return the checksum of each file below a folder, by name; without the files of a store that contain a time."""
    return {
        name: digest(folder / name)
        for name in relative_files(folder, skip=("runs", ".partial", ".claims"))
        if name not in UNSTABLE
    }


def lost(path: Path) -> int:
    """Return the number of wrong bytes in a store: in committed rows, and by the findings of `verify`."""
    if not (path / "zarr.json").exists():
        return 0
    store, wrong = flexcache.open(path), 0
    at = {name: np.asarray(variable.values) for name, variable in store.coordinates.items()}
    rows = store.committed_rows
    for name, array in store.arrays.items():
        for layer in array.slices:
            expected = activation(at["token_id"][rows], at["position"][rows], layer or 0, array.features)
            found = store.read(name, layer, rows)
            wrong += found.nbytes * (not np.array_equal(found, expected.astype(ml_dtypes.bfloat16).astype(np.float32)))
    half = UNSTABLE if (path / NOTE).exists() else ()  # changed before the plan record
    findings = [f for f in flexcache.verify(path).findings if not f.stray and Path(f.file).name not in (*half, NOTE)]
    return wrong + sum(max(1, (path / f.file).stat().st_size) if (path / f.file).exists() else 1 for f in findings)
