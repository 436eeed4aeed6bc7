"""One read of a store, many answers: mergeable statistics over shards, on Dask."""

from __future__ import annotations

from analysis.statistics.onepass.groups import Grouping, grouping
from analysis.statistics.onepass.reading import PassResult, read
from analysis.statistics.onepass.row_block import RowBlock
from analysis.statistics.onepass.sample import DocumentSample
from analysis.statistics.onepass.statistic import State, Statistic

__all__ = ["DocumentSample", "Grouping", "PassResult", "RowBlock", "State", "Statistic", "grouping", "read"]
