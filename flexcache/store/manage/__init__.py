"""Manage whole stores: extend, copy, merge, remove, verify and repair."""
