"""Benchmarks: ratios against floors and peers that are measured in the same run."""
