"""Build a probe dataset from a store: rows, targets, groups and labels."""
