"""Offline analysis of stores: probes, statistics and reports; without the model."""
