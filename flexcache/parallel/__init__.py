"""How a model lies across processes: meshes, what each rank holds of an activation, and putting it together."""

from flexcache.parallel.distribution import Distribution
from flexcache.parallel.mesh import Mesh

__all__ = ["Distribution", "Mesh"]
