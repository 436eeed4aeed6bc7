"""Edits of cached activations: what they are, the standard ones, and donors."""
