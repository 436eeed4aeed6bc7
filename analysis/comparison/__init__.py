"""Compare stores of the same tokens: relative error, cosine, CKA and transfer of probes, by site and layer."""

from __future__ import annotations

from analysis.comparison.stores import StoreComparison, compare_stores, load

__all__ = ["StoreComparison", "compare_stores", "load"]
