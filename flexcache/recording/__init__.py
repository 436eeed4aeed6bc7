"""Capture: plan, batches, forward, writer."""
