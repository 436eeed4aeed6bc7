"""The images of a store whose documents are images, and which of an image's tokens is which patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flexcache.errors import StoreError
from flexcache.images.encoded import IMAGE
from flexcache.patches import Patches
from flexcache.store.format.schema import SEQUENCES
from flexcache.store.read.coordinates import unreadable
from flexcache.store.read.parquet import open_table

if TYPE_CHECKING:
    from flexcache.store.read.store import Store


def patches_of(store: Store) -> Patches:
    """Return the layout of the tokens of an image.

    Raises
    ------
    StoreError
        The documents are no images, or what the store says of them cannot be read.
    """
    said = store.provenance.get("patches")
    if not isinstance(said, dict):
        raise StoreError("the documents of the store are no images", where=str(store.path))
    try:
        return Patches.from_json(said)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            "what the store says of its patches cannot be read", where=str(store.path), found=repr(said)[:80]
        ) from error


def image_of(store: Store, document: Any) -> bytes:
    """Return the encoded image of a document; a part of the table of sequences is read for it.

    Raises
    ------
    StoreError
        The documents are no images, or there is no such document.
    """
    patches_of(store)
    (row, *_) = store.rows(document=document)
    path = store.path / SEQUENCES
    try:
        with open_table(path) as file:
            for group in reversed(range(file.num_row_groups)):
                starts = file.read_row_group(group, columns=["row_start"]).column("row_start").to_numpy()
                line = int((starts <= row).sum()) - 1
                if line >= 0:
                    table = file.read_row_group(group, columns=[IMAGE]).slice(line, 1)
                    return bytes(table.column(IMAGE)[0].as_py())
            raise ValueError(f"no sequence has row {row}")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise unreadable("table", path, error) from error
