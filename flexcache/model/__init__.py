"""Models by name: how a checkpoint, its adapters and quantized weights are loaded."""

from flexcache.model.source import ModelSource

__all__ = ["ModelSource"]
