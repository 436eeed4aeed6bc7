"""Write an empty store: metadata, coordinates, tables, card and plan record, but no activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import zarr
from zarr.codecs import ZstdCodec

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.store.format.bfloat16 import BFloat16
from flexcache.store.format.ledger import write_plan_record
from flexcache.store.format.schema import COORDINATES
from flexcache.store.format.shard import ShardLayout
from flexcache.store.storage.backend import relative_files

COORDINATE_CHUNK = 1 << 20
"""Rows of a chunk of a coordinate, at most."""
T = TypeVar("T")


def write_skeleton(
    folder: Path,
    attributes: dict[str, Any],
    card: str,
    add_arrays: Callable[[zarr.Group], T],
    add_tables: Callable[[T], None],
) -> None:
    """Write a store without activations into *folder*, which must be empty or missing.

    *attributes* are those of the root group, and *card* is the text of README.md. *add_arrays* adds arrays and
    coordinates to the group, then *add_tables* writes the Parquet tables, given the result of the former.
    """
    group = zarr.create_group(zarr.storage.LocalStore(folder), zarr_format=3)
    group.attrs.update(attributes)
    added = add_arrays(group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        zarr.consolidate_metadata(group.store)  # before the tables: zarr warns of files that are not its own
    add_tables(added)
    (folder / "README.md").write_text(card, encoding="utf-8")
    names = relative_files(folder)
    (folder / "ledger" / "0").mkdir(parents=True)
    write_plan_record(folder, names)


def create_arrays(group: zarr.Group, arrays: list[ArraySpec], n_rows: int, shard_rows: int, compression: str) -> None:
    """Add arrays to a group: their metadata, and no activations."""
    for array in arrays:
        layout = ShardLayout(n_rows, shard_rows, array.row_bytes)
        stacked = array.layers is not None
        lead = (1,) if stacked else ()
        depth = (array.depth or 0,) if stacked else ()
        group.create_array(
            array.name,
            shape=(*depth, n_rows, array.features),
            shards=(*lead, shard_rows, array.features),
            chunks=(*lead, layout.chunk_rows, array.features),
            dtype=BFloat16() if array.dtype == "bfloat16" else DTYPES[array.dtype],
            fill_value=0 if array.dtype == "int8" else float("nan"),
            compressors=ZstdCodec(level=1) if compression == "zstd" else None,
            filters=None,
            dimension_names=array.dims,
            attributes={
                "site": array.site,
                "coordinates": " ".join(COORDINATES),
                **({"layers": list(array.layers)} if array.layers is not None else {}),
                **({"virtual": list(array.virtual)} if array.virtual else {}),
            },
        )


def create_coordinate(group: zarr.Group, name: str, n_rows: int, chunk: int | None = None) -> zarr.Array:
    """Add a coordinate of the rows to a group, in chunks of *chunk* rows."""
    return group.create_array(
        name,
        shape=(n_rows,),
        chunks=(chunk or coordinate_chunk(n_rows),),
        dtype=COORDINATES[name],
        compressors=ZstdCodec(level=1),
        dimension_names=("token",),
    )


def coordinate_chunk(n_rows: int) -> int:
    """Return the number of rows in a chunk of a coordinate."""
    return min(COORDINATE_CHUNK, 1 << max(0, n_rows - 1).bit_length())
