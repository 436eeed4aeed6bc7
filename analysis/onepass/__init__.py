"""One read of a store, many answers: mergeable statistics over shards, on Dask."""

from __future__ import annotations

from analysis.onepass.block import Block
from analysis.onepass.groups import Grouping, grouping
from analysis.onepass.reading import Reading, read
from analysis.onepass.sample import DocumentSample
from analysis.onepass.statistic import State, Statistic

__all__ = ["Block", "DocumentSample", "Grouping", "Reading", "State", "Statistic", "grouping", "read"]
