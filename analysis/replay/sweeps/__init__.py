"""Sweep edits over layers and tokens, and measure what they change."""
