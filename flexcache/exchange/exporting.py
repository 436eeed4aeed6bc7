"""Export a store to files of other tools: a file for each site and layer, or a table with a column for each."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from flexcache.errors import ConfigError, DamagedError, MismatchError, PlanError, StoreError, UncommittedError, nearest
from flexcache.exchange.export_files import FORMATS, FileExport, TextExport
from flexcache.exchange.text_export import (
    TEXT_FORMATS,
    RowChoice,
    RowChoiceOptions,
    check_text_arrays,
    text_tokenizer,
)
from flexcache.keywords import check_keywords
from flexcache.paths import local_path
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.site import Layers
from flexcache.store.format.int8 import is_scale
from flexcache.store.read.selection import select
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import is_temporary, temporaries, write_json
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.write.create import check_free_space

MANIFEST = "export.json"
_TEXTS = f"export to {' or '.join(TEXT_FORMATS)}"


def export(
    store: str | Path | Store,
    out: str | Path,
    to: str,
    *,
    sites: Sequence[str] | None = None,
    layers: Layers = "all",
    rows: str = "all",
    tokenizer: Any = None,
    progress: ProgressCallback = ignore_progress,
    **choice: Unpack[RowChoiceOptions],
) -> list[Path]:
    """Write activations as safetensors, npy or Parquet files; repeat the call to resume, file by file.

    ::

        flexcache.export("run.zarr", "exported", "safetensors", sites=["resid_post"], layers=[12])
        flexcache.export("run.zarr", "nla", "nla", sites=["resid_post"], layers=[12], per_document=10, min_position=50)

    The folder also has ``documents.parquet``, as in the store; ``export.json``, which describes the export and its
    store; and for safetensors and npy ``rows.npy``, the row numbers in the store, and ``token_id.npy``. Memory is about
    100 MB.

    Parameters
    ----------
    store
        Its path, or an open store with a model that recomputes virtual layers (`flexcache.attach`).
    to
        ``safetensors``: a file ``<site>.layer_<n>.safetensors`` for each layer, with one tensor of that name, shape
        (rows, features), in the stored dtype. ``npy``: the same, for ``np.load(…, mmap_mode="r")``, with bfloat16 as
        float32. ``parquet``: a file for each unit in ``data/``, with a line for each row and a column for each site and
        layer; bfloat16 as float32. See `flexcache.exchange.table`. ``activation-oracle`` and ``nla``: a file for each
        layer of one site, with a line for each row: its vector as float32, and the text up to its token. See
        `flexcache.exchange.text_export`.
    sites, layers
        See `flexcache.store.read.selection.select`.
    rows
        ``all``, or ``committed`` for the committed rows of a partial store.
    tokenizer
        For files with text: a tokenizer, or its folder or name; that of the store's model by default.
    per_document, min_position, limit, seed
        For files with text: rows of each document, drawn at random by its id and the seed; smallest position of a row;
        most rows in all, of the first documents. By default all rows.

    Returns
    -------
    The files with activations.

    Raises
    ------
    ConfigError
        The format or choice of rows does not exist; or a file with text is asked for rows without one.
    SiteError
        The store does not have the site or layer.
    UncommittedError
        Rows are not committed, and *rows* is ``all``.
    MismatchError
        The folder holds another export, or the tokenizer is not that of the store.
    StoreError
        The folder is a file, or holds something else.
    PlanError
        The disk has too little room.
    CaptureError
        The disk cannot be written.
    """
    if to not in (*FORMATS, *TEXT_FORMATS):
        raise ConfigError(f"there is no format {to!r}", remedy=nearest(to, (*FORMATS, *TEXT_FORMATS)))
    if rows not in ("all", "committed"):
        raise ConfigError(f"rows {rows!r} cannot be exported", expected="all or committed")
    origin, folder = store if isinstance(store, Store) else Store(store), local_path(out)
    arrays = [array for array in select(origin, sites, layers) if not is_scale(array.name, origin.arrays)]
    _check_committed(origin, rows)
    check_keywords(export, choice, RowChoiceOptions.__annotations__)
    if to in TEXT_FORMATS:
        check_text_arrays(origin, arrays, to)
        chosen = RowChoice(**choice)
        work: FileExport = TextExport(origin, folder, to, arrays, progress, text_tokenizer(origin, tokenizer), chosen)
    else:
        given = [*choice, *([] if tokenizer is None else ["tokenizer"])]
        if given:
            raise ConfigError(f"an export to {to} has no use for {given[0]}", remedy=f"leave it out, or {_TEXTS}")
        work = FileExport(origin, folder, to, arrays, progress)
    began = time.time()
    with clear_errors(folder):
        _begin(folder, work)
        files = work.run()
        _tidy(folder, began)
    return files


def _begin(folder: Path, work: FileExport) -> None:
    """Write the manifest into a new folder, or check the manifest of an earlier call."""
    path, manifest = folder / MANIFEST, work.manifest()
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file", remedy="choose another folder")
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
            different = [key for key in manifest if found.get(key) != manifest[key]]
        except (ValueError, AttributeError, RecursionError) as error:
            raise DamagedError(
                "the manifest of an export cannot be read",
                where=str(path),
                found=str(error),
                remedy="remove the folder, and export again",
            ) from error
        if different:
            raise MismatchError(
                "the folder holds another export",
                where=str(folder),
                found=f"other {', '.join(different)}",
                remedy="choose another folder, or remove this one; a store that was extended, or whose labels changed,"
                " has to be exported again",
            )
        return
    if folder.exists() and not all(is_temporary(path) for path in folder.iterdir()):
        raise StoreError(
            f"{folder} is not empty and does not hold an export",
            remedy="choose another folder, or remove it if it is not needed",
        )
    try:
        check_free_space(folder, len(work.rows) * work.row_bytes)
    except PlanError as error:
        raise PlanError(
            "the export does not fit on the disk",
            where=error.where,
            expected=error.expected,
            found=error.found,
            remedy="make room, choose another disk, or export fewer sites and layers",
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)


def _check_committed(store: Store, rows: str) -> None:
    if rows == "all" and not store.complete:
        raise UncommittedError(
            "not all rows of the store are committed",
            where=str(store.path),
            expected=f"{store.n_units} units",
            found=f"{len(store.committed_units)} units",
            remedy="run the same capture again to complete the store, or export the committed rows"
            " (--rows committed, rows='committed')",
        )


def _tidy(folder: Path, began: float) -> None:
    """Remove temporary files of interrupted exports, which are older than *began*."""
    for path in temporaries(folder):
        if path.stat().st_mtime < began:
            path.unlink(missing_ok=True)
