"""Prove that a site in a model is what its name says."""
