"""The store as a training stream: shuffled, resumable, aligned over layers, sites and stores. Needs torch."""

from __future__ import annotations

from flexcache.training.stream import Loader, Stream, stream

__all__ = ["Loader", "Stream", "stream"]
