"""The lines of a store's tables: whole numbers that name rows of it, checked before they are believed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.store.format.schema import DOCUMENTS

NUMBERS = ("row_start", "n_rows")
OF_DOCUMENTS = ("n_tokens",)


def check_lines(name: str, table: pa.Table, n_rows: int) -> pa.Table:
    """Return a table as far as the first *n_rows* rows of a store go; it may have grown since it was opened.

    Raises
    ------
    ValueError
        A column is missing, of another kind, or leads beyond the rows.
    """
    columns = (*NUMBERS, *(OF_DOCUMENTS if name == DOCUMENTS else ()))
    missing = {*columns, *(("id",) if name == DOCUMENTS else ())} - set(table.column_names)
    if missing:
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    for column in columns:
        kind = table.column(column).type
        if not pa.types.is_integer(kind) or table.column(column).null_count:
            raise ValueError(f"column {column} is {kind}, or has nulls, where whole numbers belong")
    starts = table.column("row_start").to_numpy()
    if len(starts) and starts[-1] >= n_rows:
        table = table.slice(0, int(np.searchsorted(starts, n_rows)))
    for column in NUMBERS:
        values = table.column(column).to_numpy()
        if len(values) and not (values.min() >= 0 and values.max() <= n_rows):
            raise ValueError(f"column {column} leads beyond the {n_rows} rows")
    starts, counts = (table.column(column).to_numpy() for column in NUMBERS)
    if (starts + counts > n_rows).any():
        raise ValueError(f"a line leads beyond the {n_rows} rows")
    return table
