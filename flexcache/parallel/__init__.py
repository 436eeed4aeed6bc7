"""Models on several processes: meshes, the piece of an activation that each rank holds, and its assembly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache.parallel.distribution import Distribution
    from flexcache.parallel.mesh import Mesh
    from flexcache.parallel.stages import Stages

__all__ = ["Distribution", "Mesh", "Stages"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Distribution": "flexcache.parallel.distribution:Distribution",
        "Mesh": "flexcache.parallel.mesh:Mesh",
        "Stages": "flexcache.parallel.stages:Stages",
    },
)
