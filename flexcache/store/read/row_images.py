"""Images of a store whose documents are images, and the layout of their tokens."""

from __future__ import annotations

import pyarrow as pa

from flexcache.errors import StoreError
from flexcache.images.encoded import IMAGE
from flexcache.patches import Patches
from flexcache.store.format.provenance import Provenance
from flexcache.store.format.schema import SEQUENCES
from flexcache.store.read.coordinates import unreadable
from flexcache.store.read.parquet import open_table
from flexcache.store.storage.location import StoreLocation


def read_patches(provenance: Provenance, where: StoreLocation) -> Patches:
    """Return the layout of the tokens of an image; StoreError if the documents are not images, or it cannot be read."""
    recorded = provenance.others.get("patches")
    if not isinstance(recorded, dict):
        raise StoreError("the documents of the store are not images", where=str(where))
    try:
        return Patches.from_json(recorded)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            "the recorded patch layout cannot be read", where=str(where), found=repr(recorded)[:80]
        ) from error


def read_image(path: StoreLocation, row: int) -> bytes:
    """Return the encoded image that a row belongs to; reads one row group of the sequences."""
    path = path / SEQUENCES
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
