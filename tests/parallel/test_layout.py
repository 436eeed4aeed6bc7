from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from flexcache.errors import LayoutError
from flexcache.parallel.layout import find_sharded_dim, localize


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "whole", "dim"),
    [((2, 7, 64), (2, 7, 64), None), ((2, 7, 32), (2, 7, 64), 2), ((2, 4, 64), (2, 7, 64), 1), ((0, 3), (2, 3), 0)],
)
def test_one_dim_that_differs_is_the_sharded_one(shape: tuple, whole: tuple, dim: int | None) -> None:
    assert find_sharded_dim(shape, whole, "site", 2) == dim


@pytest.mark.parametrize(
    ("shape", "whole", "message"),
    [
        ((2, 4, 32), (2, 7, 64), r"expected: \(2, 7, 64\), or a shard of it along one dim"),
        ((2, 7), (2, 7, 64), "cannot be explained"),
        ((2, 65), (2, 64), "cannot be explained"),
        ((2, 64), None, r"not known.*found: \(2, 64\) on this rank of 2.*because; .*expected_shape|expected_shape"),
    ],
)
def test_a_difference_in_several_dims_raises(shape: tuple, whole: tuple | None, message: str) -> None:
    with pytest.raises(LayoutError, match=f"(?s){message}"):
        find_sharded_dim(shape, whole, "site", 2, "because")


def test_a_plain_tensor_is_returned_as_it_is() -> None:
    x = torch.randn(2, 3)
    local = localize(x, "site")
    assert local.tensor is x
    assert not local.known
    assert local.restore(x) is x


@pytest.mark.parametrize("placement", [Replicate(), Shard(1), Shard(-1), Partial()])
def test_a_dtensor_states_its_layout_and_can_be_restored(mesh: DeviceMesh, placement: object) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    tensor = DTensor.from_local(x, mesh, [placement], run_check=False)
    local = localize(tensor, "site")
    assert local.known
    assert local.shape == (2, 3)
    assert local.sharded == (1 if placement.is_shard() else None)
    assert torch.equal(local.tensor, x)
    again = local.restore(2 * local.tensor)
    assert isinstance(again, DTensor)
    assert again.placements == (Replicate() if placement.is_partial() else placement,) or local.sharded == 1
    again.full_tensor().sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))
