"""Evaluate a probe by cross-validation: folds, fits, scores and baselines."""
