"""flexcache merge: stores over one plan into one store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexcache.store.manage.merge import merge
from flexcache.store.read.store import Store
from pipelines.bars import bytes_bar


def run(sources: Sequence[Path], target: Path, *, progress: bool = True) -> Store:
    """Join stores and return the result; see `flexcache.store.manage.merge.merge`."""
    with bytes_bar("merging", progress) as bar:
        return merge(sources, target, progress=bar)
