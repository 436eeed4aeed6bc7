"""Options of reading a stream: memory, threads, page cache, and the share of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from flexcache.errors import ConfigError
from flexcache.keywords import check_keywords
from flexcache.parallel.launch import launch
from flexcache.spec import is_whole


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """Memory, threads, page cache and data-parallel rank of a stream; each field is also a keyword of `stream`.

    >>> ReaderOptions(threads=4).pool_bytes
    268435456

    Attributes
    ----------
    pool_bytes : int
        Memory of a pool over all ranks and workers, which share it. Two are alive, the current and the next one.
    run_bytes : int
        Bytes of a run, which is read in one piece.
    keep_cache : bool, or None
        Keep pages that were read in the page cache; by default if all rows fit into a quarter of memory.
    threads : int
        Number of runs that are read at the same time.
    rank, ranks : int, or None
        Rank and size of a data-parallel group; taken from the launcher or torch.distributed by default.
    """

    pool_bytes: int = 256 << 20
    run_bytes: int = 256 << 10
    keep_cache: bool | None = None
    threads: int = 16
    rank: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        if not all(is_whole(n) and n >= 1 for n in (self.pool_bytes, self.run_bytes, self.threads)):
            raise ConfigError("pool_bytes, run_bytes and threads are whole numbers of at least 1")
        if (self.rank is None) != (self.ranks is None):
            raise ConfigError("rank and ranks are given together")
        if self.rank is not None and self.ranks is not None:
            if not is_whole(self.rank) or not is_whole(self.ranks):
                raise ConfigError("rank and ranks are whole numbers", found=f"{self.rank!r} and {self.ranks!r}")
            if not 0 <= self.rank < self.ranks:
                raise ConfigError(
                    "rank is a number below ranks", expected=f"0 to {self.ranks - 1}", found=str(self.rank)
                )

    @classmethod
    def from_keywords(cls, named: dict[str, Any], function: Callable[..., Any]) -> ReaderOptions:
        """Return the options given as keywords of *function*.

        Raises
        ------
        ConfigError
            A keyword is unknown, or a value cannot be used.
        """
        check_keywords(function, named, (field.name for field in fields(cls)))
        return cls(**named)

    def with_group(self) -> ReaderOptions:
        """Return the options with *rank* and *ranks* of this process, if they are not given."""
        if self.rank is not None:
            return self
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return replace(self, rank=torch.distributed.get_rank(), ranks=torch.distributed.get_world_size())
        place = launch()
        return replace(self, rank=place.rank, ranks=place.world)
