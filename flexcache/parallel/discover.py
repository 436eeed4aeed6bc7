"""The distribution of a model, as its wrappers and weights state it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from flexcache.parallel.stages import Stages

FSDP_DIMS = ("dp_replicate", "dp_shard", "dp", "fsdp", "data", "data_parallel", "replicate", "shard", "ddp")
TENSOR_DIMS = ("tp", "tensor", "tensor_parallel", "model")


def discover_axes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the global ranks along each axis that the model's wrappers and weights state; this process is one of them.

    They are read from the process groups of DDP, FSDP and DeepSpeed, the device mesh of a transformers model, and the
    meshes of DTensor weights. An axis of one rank, or one that is not stated, is absent. Communicates nothing.
    """
    found: dict[str, tuple[int, ...]] = {}
    for module in model.modules():
        for axis, ranks in _of(module):
            if len(ranks) > 1:
                found.setdefault(axis, ranks)
    sharded = [mesh for module in model.modules() if (mesh := _fsdp_mesh(module)) is not None]
    if sharded:
        ranks = tuple(int(rank) for rank in _through(sharded[0]))
        if len(ranks) > 1:
            found.setdefault("dp", ranks)
    if "tp" not in found:
        tensor = _tensor_ranks(model, sharded[0] if sharded else None)
        if tensor is not None and len(tensor) > 1:
            found["tp"] = tensor
    return found


def runs_its_pipeline(model: nn.Module) -> bool:
    """Return True if transformers runs the model's pipeline, so that every rank calls the whole model."""
    return any(getattr(module, "_pp_stage", None) is not None for module in model.modules())


def _of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    name = type(module).__name__
    if isinstance(module, Stages):
        yield "pp", _ranks(module.group)
    if name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        yield "dp", _ranks(module.process_group)
    elif name == "DeepSpeedEngine":
        group = getattr(module, "data_parallel_group", None)
        yield "dp", _ranks(group if group is not None else dist.group.WORLD)
    mesh: Any = getattr(module, "_device_mesh", None)
    if mesh is not None and getattr(mesh, "mesh_dim_names", None):
        for axis, dims in (("pp", ("pp",)), ("dp", ("fsdp", "dp_replicate", "dp")), ("tp", ("tp",))):
            for dim in dims:
                if dim in mesh.mesh_dim_names:
                    yield axis, _along(mesh, dim)


def _fsdp_mesh(module: nn.Module) -> Any:
    """Return the mesh over which FSDP2 shards a module's weights, or None."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    info = getattr(groups[0], "mesh_info", None) if groups and groups[0] is not None else None
    return getattr(info, "mesh", None)


def _tensor_ranks(model: nn.Module, fsdp: Any) -> tuple[int, ...] | None:
    """Return the ranks along the mesh dim of DTensor weights that is not FSDP's."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    taken = set(getattr(fsdp, "mesh_dim_names", None) or ())
    for mesh in sorted(meshes, key=lambda mesh: mesh.ndim, reverse=True):
        if fsdp is not None and mesh.ndim == fsdp.ndim:
            continue
        if mesh.ndim == 1:
            return _through(mesh)
        dims = [name for name in mesh.mesh_dim_names or () if name not in taken and name not in FSDP_DIMS]
        named = [name for name in dims if name in TENSOR_DIMS] or dims
        if len(named) == 1:
            return _along(mesh, named[0])
    return None


def _along(mesh: Any, dim: str) -> tuple[int, ...]:
    return _through(mesh[dim])


def _through(mesh: Any) -> tuple[int, ...]:
    return tuple(int(rank) for rank in mesh.mesh.flatten().tolist())


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
