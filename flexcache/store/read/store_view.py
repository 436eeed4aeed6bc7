"""The part of a store that the modules below it read, as a protocol, so that they need not import `Store`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from flexcache.spec import ArraySpec
from flexcache.store.storage.location import StoreLocation


class StoreView(Protocol):
    """An open store, see `flexcache.Store`."""

    @property
    def path(self) -> StoreLocation:
        """Location of the store."""

    @property
    def arrays(self) -> Mapping[str, ArraySpec]:
        """Arrays by name."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """Spec of the capture."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """Numbers of the plan."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Model, tokenizer, corpus and versions."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""

    @property
    def n_units(self) -> int:
        """Number of units."""

    @property
    def shard_rows(self) -> int:
        """Rows of a unit."""

    @property
    def compressed(self) -> bool:
        """True if shards are compressed."""

    @property
    def complete(self) -> bool:
        """True if all units are committed."""

    @property
    def committed_units(self) -> np.ndarray:
        """Numbers of the committed units."""

    @property
    def tokens(self) -> pa.Table:
        """The sequences."""

    def head(self, count: int = 1) -> pa.Table:
        """Return the first *count* documents."""
