"""Prove with small forwards which sequences may share a batch."""
