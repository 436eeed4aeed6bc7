"""Stream the rows of stores into training: shuffled, resumable, aligned over layers, sites and stores; needs torch."""

from __future__ import annotations

from flexcache.training.reader_options import ReaderOptions
from flexcache.training.row_stream import Loader, Stream
from flexcache.training.stream import stream

__all__ = ["Loader", "ReaderOptions", "Stream", "stream"]
