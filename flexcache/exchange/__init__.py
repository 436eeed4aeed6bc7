"""Convert stores to and from files of other tools: safetensors, npy, Parquet and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache.exchange.exporting import export
    from flexcache.exchange.importing import import_folder

__all__ = ["export", "import_folder"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "export": "flexcache.exchange.exporting:export",
        "import_folder": "flexcache.exchange.importing:import_folder",
    },
)
