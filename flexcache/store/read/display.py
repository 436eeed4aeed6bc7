"""Render a store as text for a terminal, and as HTML for a notebook."""

from __future__ import annotations

from html import escape

import numpy as np

from flexcache.paths import shown
from flexcache.store.format.committed_units import CommittedUnits
from flexcache.store.format.model_record import adapters_text, engine_text
from flexcache.store.format.schema import DOCUMENTS, read_attributes, staged_folder
from flexcache.store.format.text import TABLE_COLUMNS, layers_text, size
from flexcache.store.read.open_store import OpenStore
from flexcache.store.read.parquet import read_first_lines


def summary(store: OpenStore) -> dict[str, str]:
    """Return the main facts about a store as short texts."""
    plan = store.plan
    done = len(store.committed_units)
    state = "complete" if store.complete else f"{done} of {store.n_units} units committed"
    state += ", and documents that are not planned yet" if store.growing else ""
    state += _extension(store)
    record = store.provenance.model
    parts = (store.provenance.model_name or "unknown", adapters_text(record))
    engine = engine_text(record)
    return {
        "model": ", with adapter ".join(filter(None, parts)) + (f", in {engine}" if engine else ""),
        "rows": f"{store.n_rows:,} ({store.spec.rows} tokens of {plan.get('documents', 0):,} documents)",
        "state": state,
        "units": f"{store.n_units:,} of {store.shard_rows:,} rows",
        "size": f"{size(array_bytes(store))} {'before compression' if store.compressed else 'when complete'}",
    }


def _extension(store: OpenStore) -> str:
    folder = staged_folder(store.path)
    if folder is None:
        return ""
    units = int(read_attributes(folder)["plan"]["units"])
    done = int(np.count_nonzero(CommittedUnits(folder, units).mask))
    return f"; an extension has begun: {done} of {units} units"


def sites(store: OpenStore) -> list[tuple[str, str, str, str]]:
    """Return the name, layers, shape and dtype of each site as text."""
    lines = []
    for name in store.sites:
        array = store.arrays[name]
        lead = f"{len(array.captured)} × " if array.layers is not None else ""
        lines.append((name, layers_text(array), f"{lead}{store.n_rows} × {array.features}", array.dtype))
    return lines


def array_bytes(store: OpenStore) -> int:
    """Return the bytes of the rows of all arrays."""
    return sum(len(array.slices) * array.row_bytes for array in store.arrays.values()) * store.n_rows


def text(store: OpenStore) -> str:
    """Return the store as lines of text."""
    facts = summary(store)
    lines = [f"<flexcache.Store {shown(store.path)}>"]
    lines += [f"  {name + ':':<7} {value}" for name, value in facts.items()]
    rows = [("site", "layers", "shape", "dtype"), *sites(store)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    captured = read_first_lines(store.path / DOCUMENTS, 0).column_names
    labels = [name for name in captured if name not in TABLE_COLUMNS]
    if labels:
        lines.append(f"  labels: {', '.join(labels)}")
    for table in store.label_tables.values():
        later = table.describe_later(int(store.plan["documents"]))
        lines += [f"  joined: {', '.join(table.columns)} (table {table.name})", *([f"  {later}"] if later else [])]
    return "\n".join(lines)


def html(store: OpenStore) -> str:
    """Return the store as small HTML tables; all text of the store is escaped."""
    facts = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in summary(store).items()
    )
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("site", "layers", "shape", "dtype"))
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in sites(store)
    )
    return (
        f"<div><strong>flexcache.Store</strong> <code>{escape(shown(store.path))}</code>"
        f"<table>{facts}</table><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
