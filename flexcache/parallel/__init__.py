"""How a model lies across processes: meshes, what each rank holds of an activation, and putting it together."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexcache.parallel.distribution import Distribution
    from flexcache.parallel.mesh import Mesh

__all__ = ["Distribution", "Mesh"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: a launcher is asked without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'flexcache.parallel' has no attribute {name!r}")
    return getattr(import_module(f"flexcache.parallel.{name.lower()}"), name)
