"""Stores on object storage: what differs from a file system, over any file system that fsspec knows."""
