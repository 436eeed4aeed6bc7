"""flexcache export: a store as safetensors, npy or Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flexcache.exchange.exporting import export
from flexcache.paths import output_folder, shown
from flexcache.store.format.text import size
from pipelines.bars import bytes_bar


def run(
    store: Path,
    out: Path,
    to: str,
    console: Console,
    *,
    sites: Sequence[str] | None = None,
    layers: str = "all",
    rows: str = "all",
    progress: bool = True,
) -> list[Path]:
    """Export a store and say what was written; see `flexcache.exchange.exporting.export`."""
    out = output_folder(out)
    with bytes_bar("exporting", progress) as bar:
        files = export(store, out, to, sites=sites or None, layers=layers, rows=rows, progress=bar)
    total = size(sum(path.stat().st_size for path in files))
    console.print(f"{len(files)} files, {total}, in {shown(out)}", highlight=False, markup=False)
    return files
