"""flexcache copy: a store to another place, as it is or converted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexcache.store.manage.copy import copy
from flexcache.store.read.store import Store
from pipelines.bars import bytes_bar


def run(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    compression: str | None = None,
    sites: Sequence[str] | None = None,
    layers: str = "all",
    progress: bool = True,
) -> Store:
    """Copy a store and return the copy; see `flexcache.store.manage.copy.copy`."""
    with bytes_bar("copying", progress) as bar:
        return copy(
            source,
            target,
            sites=sites or None,
            layers=layers,
            dtype=dtype,
            compression=compression,
            progress=bar,
        )
