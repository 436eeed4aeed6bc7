"""Offline analysis of stores: probes and reports; without the model."""
