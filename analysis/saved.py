"""Save results as Zarr with their provenance, and load them instead of computing them again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import xxhash
import zarr

import flexcache
from flexcache.errors import AnalysisError
from flexcache.paths import local_path
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import temporary_name
from flexcache.store.storage.backend import digest

FORMAT = "flexcache statistics 1"
ATTRIBUTE = "flexcache_statistics"


def identity(store: Store) -> dict[str, Any]:
    """Return the identity of a store and of its committed rows; results with another identity come from other rows."""
    return {
        "store": store.path.name,
        "metadata_xxh3_128": digest(store.path / "zarr.json"),
        "plan_xxh3_128": str(store.plan.get("corpus_xxh3_128", "")),
        "units": len(store.committed_units),
        "units_xxh3_128": xxhash.xxh3_128_hexdigest(store.committed_units.tobytes()),
        "rows": len(store.committed_rows),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    names = ("numpy", "scipy", "xarray", "dask", "zarr")
    return {"flexcache": flexcache.__version__, **{name: version(name) for name in names}}


def save(results: Mapping[str, xr.Dataset], path: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write results as one Zarr v3 group with a subgroup each; results that are there are replaced in one step.

    ::

        saved.save({"moments": moments.compute(store, "resid_post")}, "moments.zarr", saved.identity(store))

    Numbers and booleans are arrays with dimension names, which any Zarr reader opens. Text coordinates are lists in
    the attributes, because Zarr v3 has no settled data type for text.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        group = zarr.create_group(zarr.storage.LocalStore(temporary), zarr_format=3)
        group.attrs[ATTRIBUTE] = {"format": FORMAT, "results": list(results), **_plain(provenance)}
        for name, result in results.items():
            _write(group.create_group(name), result)
        check_free(path)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def check_free(path: Path) -> None:
    """Raise AnalysisError if *path* exists and is not a folder of saved results."""
    if os.path.lexists(path) and not (path / "zarr.json").exists():
        raise AnalysisError(
            "the path of the results is taken by something else", where=str(path), remedy="choose another folder"
        )


def load(path: str | Path) -> tuple[dict[str, xr.Dataset], dict[str, Any]]:
    """Load results and provenance that `save` wrote.

    ::

        results, provenance = saved.load("results/resid_post.stats.zarr")

    Raises
    ------
    AnalysisError
        The folder holds no results, or results of another version.
    """
    path = local_path(path)
    try:
        group = zarr.open_group(path, mode="r")
        provenance: Any = dict(group.attrs)[ATTRIBUTE]
        if provenance["format"] != FORMAT:
            raise AnalysisError(
                "the results are in another format", where=str(path), expected=FORMAT, found=str(provenance["format"])
            )
        return {name: _read(group[name]) for name in provenance["results"]}, provenance
    except AnalysisError:
        raise
    except FileNotFoundError as error:
        raise AnalysisError(
            "there are no saved results", where=str(path), remedy="run flexcache stats STORE -o FOLDER first"
        ) from error
    except Exception as error:  # zarr and its codecs raise many kinds
        raise AnalysisError(
            "the saved results cannot be read",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            remedy="remove the folder and compute them again",
        ) from error


def reusable(path: str | Path, provenance: Mapping[str, Any]) -> bool:
    """Return True if *path* holds results of the same store, rows, arguments and versions."""
    try:
        found = dict(zarr.open_group(local_path(path), mode="r").attrs)[ATTRIBUTE]
    except Exception:  # anything unreadable is not reusable
        return False
    return isinstance(found, dict) and all(found.get(key) == value for key, value in _plain(provenance).items())


def _write(group: zarr.Group, result: xr.Dataset) -> None:
    described: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for name, variable in result.variables.items():
        values = variable.values
        if values.dtype.kind in "OUS":
            texts[str(name)] = {"dims": list(variable.dims), "values": values.tolist()}
            continue
        array = group.create_array(
            str(name),
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(max(1, size) for size in values.shape),
            dimension_names=list(map(str, variable.dims)),
        )
        array[...] = values
        described[str(name)] = "coordinate" if name in result.coords else "variable"
    group.attrs.update({"arrays": described, "texts": texts, "attributes": _plain(result.attrs)})


def _read(group: Any) -> xr.Dataset:
    attrs = dict(group.attrs)
    data: dict[str, Any] = {}
    coordinates: dict[str, Any] = {}
    for name, kind in attrs["arrays"].items():
        array = group[name]
        variable = (array.metadata.dimension_names or (), np.asarray(array[...]))
        (coordinates if kind == "coordinate" else data)[name] = variable
    for name, text in attrs["texts"].items():
        coordinates[name] = (text["dims"], np.array(text["values"]))
    return xr.Dataset(data, coordinates, attrs["attributes"])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
