"""The rows of the batches of a unit, and their digests, as the ledger has them for virtual layers."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pyarrow.compute as pc
import xxhash

from flexcache.plan import parts
from flexcache.store.format.ledger import UnitRecord
from flexcache.store.format.schema import CONTEXT, SEQUENCES
from flexcache.store.read.parquet import open_table
from flexcache.store.read.store import Store


def batch_rows(store: Store, unit: int, batch_tokens: int) -> list[range]:
    """Return the rows of each batch of a unit, in the order of the batches within a budget of tokens.

    ::

        batch_rows(store, 0, store.ledger.read_record(0).batch_tokens)  # [range(0, 61), range(61, 120), …]
    """
    sides = ["tokens", *([CONTEXT] if store.spec.decoder is not None else [])]
    columns = ["unit", "batch", "row_start", "n_rows", *sides]
    with open_table(store.path / SEQUENCES) as file:
        place = file.schema_arrow.get_field_index("unit")
        groups = [file.metadata.row_group(i).column(place).statistics for i in range(file.num_row_groups)]
        chosen = [i for i, held in enumerate(groups) if held.min <= unit <= held.max]
        table = file.read_row_groups(chosen, columns=columns).filter(pc.field("unit") == unit)
    lengths = np.max([pc.list_value_length(table.column(name)).to_numpy() for name in sides], axis=0)
    first, count = (table.column(name).to_numpy() for name in ("row_start", "n_rows"))
    found = []
    for _, lines in groupby(range(len(lengths)), table.column("batch").to_pylist().__getitem__):
        of_batch = list(lines)
        for start, stop in parts(lengths[of_batch].tolist(), batch_tokens):
            low, high = of_batch[start], of_batch[stop - 1]
            found.append(range(int(first[low]), int(first[high] + count[high])))
    return found


def hash_batches(store: Store, record: UnitRecord, site: str, layer: int | None) -> tuple[str, ...]:
    """Return the XXH3-128 in hex of the stored rows of each batch of a unit, for a layer that is on disk.

    They are the digests that `UnitRecord.virtual` would have of it.
    """
    reader = store.reader(site)
    spans = batch_rows(store, record.unit, record.batch_tokens)
    blocks = (np.ascontiguousarray(reader.scan(layer, rows.start, rows.stop, raw=True)) for rows in spans)
    return tuple(xxhash.xxh3_128_hexdigest(block.view(np.uint8).data) for block in blocks)
