"""Mergeable statistics of a store, computed in one read."""
