"""flexcache info: show the content of a store, its size, how complete it is, and its provenance."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexcache.store.format.model_record import IDENTITY
from flexcache.store.format.text import size
from flexcache.store.read.display import sites, summary
from flexcache.store.read.store import Store
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation

LONGEST = 80
"""Characters of a text of the provenance that are shown."""


def run(path: StoreLocation, console: Console) -> None:
    """Print the content of a store, its documents, provenance and runs."""
    store = Store(path)
    on_disk = sum(storage_of(path).file_sizes().values())
    facts = Table(title=f"[bold]{escape(str(path))}[/]", title_justify="left", show_header=False, box=None)
    for name, value in {**summary(store), "on disk": size(on_disk)}.items():
        facts.add_row(name, escape(value))
    console.print(facts)

    table = Table("site", "layers", "shape", "dtype", box=None, title_justify="left")
    for row in sites(store):
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)

    documents = Table("column", "type", "for example", title="documents", title_justify="left", box=None)
    head = store.head()
    for field in head.schema:
        first = str(head.column(field.name)[0].as_py()) if len(head) else ""
        documents.add_row(escape(field.name), str(field.type), escape(first if len(first) < 60 else first[:57] + "…"))
    console.print(documents)
    if store.token_labels:
        console.print(f"labels of tokens: {escape(', '.join(store.token_labels))}", highlight=False)

    for labels in store.label_tables.values():
        later = labels.describe_later(int(store.plan["documents"]))
        console.print(f"label table {escape(str(labels))}" + (f"\n{escape(later)}" if later else ""), highlight=False)

    origin = Table(title="made with", title_justify="left", show_header=False, box=None)
    options = store.spec.model_dump(mode="json", exclude_defaults=True)
    for name, value in {**store.provenance.to_json(), "options": options}.items():
        if text := _text(_without_digests(value)):
            origin.add_row(escape(name), escape(text))
    console.print(origin)
    logs: list[StoreLocation] = [*(path / "runs").glob("*.json")]
    for run_path in sorted(logs, key=str):
        try:
            content = json.loads(run_path.read_bytes())
            tokens, seconds = int(content["tokens"]), float(content["seconds"])
            line = f"{content['units']} units, {tokens:,} tokens in {seconds:.1f} s: {content['outcome']}"
        except (OSError, ValueError, KeyError, TypeError):
            line = "cannot be read"
        console.print(f"run {escape(run_path.stem)}: {escape(line)}", highlight=False)


def _without_digests(value: Any) -> Any:
    """Return a record without digests and the identity of the model, which only programs compare."""
    if not isinstance(value, dict):
        return value
    return {
        name: _without_digests(item)
        for name, item in value.items()
        if name != IDENTITY and not name.endswith("xxh3_128")
    }


def _text(value: Any) -> str:
    """Return a record as text on one line; values that say nothing are left out."""
    if isinstance(value, dict):
        items = {name: _text(item) for name, item in value.items()}
        return "; ".join(f"{name}: {text}" for name, text in items.items() if text)
    if isinstance(value, list):
        return ", ".join(f"({text})" if isinstance(item, dict) else text for item in value if (text := _text(item)))
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
