"""Compute any number of mergeable statistics in one read of a store, on Dask."""

from __future__ import annotations

from analysis.statistics.onepass.groups import Grouping, grouping
from analysis.statistics.onepass.reading import PassResult, read
from analysis.statistics.onepass.row_block import RowBlock
from analysis.statistics.onepass.sample import DocumentSample
from analysis.statistics.onepass.statistic import State, Statistic

__all__ = ["DocumentSample", "Grouping", "PassResult", "RowBlock", "State", "Statistic", "grouping", "read"]
