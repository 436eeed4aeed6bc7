"""Capture of models on several processes, held against the store of a single one."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

import flexcache
from flexcache.errors import CaptureError, ConfigError, LayoutError, MismatchError
from flexcache.hooks.locate.names import as_one_module, modules_by_path
from flexcache.identity import comparable_record, differences
from tests.corpora import lengths, token_documents
from tests.distributed.checks.data import zero_engines
from tests.distributed.checks.pipeline import halves
from tests.distributed.checks.tensor import UNEVEN, saved, shard
from tests.distributed.registry import check
from tests.models import FAMILIES, VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents(lengths(44, longest=25), vocabulary=VOCABULARY)
MANY_DOCUMENTS = token_documents(lengths(90, longest=25), vocabulary=VOCABULARY)
"""In 3 and in 5 units, which two or three ranks do not share evenly."""
OPTIONS: dict[str, Any] = {"progress": False, "batch_tokens": 100}
SITES = ["resid_pre", "resid_post", "mlp_post", "attn_out", "mlp_out", "model.layers.1.self_attn.q_proj"]
TOLERANCE = 1e-5
"""Of the largest value of an array: what sums over shards, taken in another order, may change in float32."""


@contextmanager
def folder() -> Iterator[Path]:
    """Give one new folder to all ranks."""
    path = [mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(path, 0)
    yield Path(path[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path[0], ignore_errors=True)
    dist.barrier()


def compare(model: Any, plain: nn.Module, exact: bool, documents: Any = DOCUMENTS, **options: Any) -> None:
    """Capture a distributed model and, on rank 0, the plain one; the stores must agree."""
    options = {**OPTIONS, "sites": SITES, **options}
    with folder() as place:
        flexcache.capture(model, None, documents, place / "together.zarr", **options)
        dist.barrier()
        if dist.get_rank() == 0:
            together = flexcache.open(place / "together.zarr")
            alone = flexcache.capture(plain, None, documents, place / "alone.zarr", **options)
            assert together.complete
            assert flexcache.verify(together.path).sound
            if exact:
                assert shard_hashes(together.path) == shard_hashes(alone.path)
                assert [record.virtual for record in together.ledger] == [record.virtual for record in alone.ledger]
            for name, array in alone.arrays.items():
                for layer in array.slices:
                    found, expected = together.read(name, layer), alone.read(name, layer)
                    error = np.abs(found - expected).max() / np.abs(expected).max()
                    assert error <= TOLERANCE, f"{name} {layer}: off by {error:.3g} of its largest value"
            assert {p.name for p in together.path.iterdir()} == {p.name for p in alone.path.iterdir()}
            found = differences(*(comparable_record(store.provenance.model) for store in (alone, together)))
            assert not [line for line in found if line.startswith(("weights", "buffers", "outputs"))], found
            assert all(store.provenance.model["identity"]["weights"] for store in (together, alone))
    parts = (
        [model] if isinstance(model, nn.Module) else [s.submod for s in (model if isinstance(model, list) else [model])]
    )
    for name, module in (pair for part in parts for pair in part.named_modules()):
        assert not any("flexcache" in str(getattr(h, "__module__", "")) for h in module._forward_hooks.values()), name
    assert all(parameter.requires_grad for part in parts for parameter in part.parameters())


def loaded(family: str, overrides: dict[str, Any] | None = None, **sizes: int) -> nn.Module:
    """Return a model that transformers distributes while it is loaded."""
    import transformers
    from transformers.distributed import DistributedConfig

    with saved(family, **(overrides or {})) as path:
        cls = getattr(transformers, FAMILIES[family][0])
        return cls.from_pretrained(path, distributed_config=DistributedConfig(**sizes)).eval()


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# One model on several ranks


@check(2)
def tensor_parallel() -> None:
    compare(loaded("llama", tp_size=2), tiny("llama"), exact=False)
    compare(loaded("gpt_neox", tp_size=2), tiny("gpt_neox"), exact=False, sites=["resid_post", "mlp_post"])


@check(2)
def virtual_layers() -> None:
    """Each rank hashes the layers that it owns; `verify` finds the digests of all."""
    options: dict[str, Any] = {"sites": ["resid_post", "z"], "keep": {"resid_post": "every 2"}}
    compare(loaded("llama", tp_size=2), tiny("llama"), exact=False, **options)
    compare(loaded("llama", pp_size=2), tiny("llama"), exact=True, **options)
    compare(sharded(tiny("llama")), tiny("llama"), exact=True, **options)


@check(2)
def tensor_parallel_by_parallelize_module() -> None:
    compare(shard(tiny("llama")), tiny("llama"), exact=False)
    compare(shard(tiny("llama"), sequence=True), tiny("llama"), exact=False)


@check(2)
def a_model_that_needs_a_mask_is_refused_where_tokens_are_sharded() -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")
    with folder() as place, pytest.raises(LayoutError, match="takes no attention mask, and needs one"):
        flexcache.capture(shard(model, sequence=True), None, DOCUMENTS, place / "run.zarr", **OPTIONS)


@check(3)
def tensor_parallel_in_uneven_shards() -> None:
    compare(loaded("llama", UNEVEN, tp_size=3), tiny("llama", **UNEVEN), exact=False)


@check(2)
def files_of_tensor_parallel_ranks_are_shared_out_evenly() -> None:
    from flexcache.recording.forward.capture_targets import find_targets
    from flexcache.recording.run.model_parallel_group import ModelParallelGroup
    from flexcache.spec import CaptureSpec

    model = loaded("llama", tp_size=2)
    group = ModelParallelGroup(model)
    targets = find_targets(model, CaptureSpec(sites={"resid_post": "all", "mlp_post": "all"}))
    keys: list[Any] = [None, None]
    dist.all_gather_object(keys, group.keys(targets.points))
    assert not set(keys[0]) & set(keys[1])
    assert len(keys[0]) == len(keys[1]) == 4
    group.close()


@check(2)
def a_rank_that_cannot_write_is_an_error_on_every_rank_and_commits_nothing() -> None:
    from flexcache.store.write.shard_writer import Writer

    put, rank = Writer.put_in_place, dist.get_rank()

    def full(self: Writer, files: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = loaded("llama", tp_size=2)
    with folder() as shared:
        if rank == 1:
            Writer.put_in_place = full  # type: ignore[method-assign]
        try:
            with pytest.raises(CaptureError, match="another process of the group" if rank == 0 else "No space left"):
                flexcache.capture(model, None, DOCUMENTS, shared / "run.zarr", **OPTIONS)
        finally:
            Writer.put_in_place = put  # type: ignore[method-assign]
        assert not flexcache.open(shared / "run.zarr").committed_units.size
        dist.barrier()
        store = flexcache.capture(model, None, DOCUMENTS, shared / "run.zarr", **OPTIONS)
        assert store.complete
        assert flexcache.verify(store.path).sound


@check(2)
def patterns_and_encoders_under_tensor_parallel() -> None:
    def entropy(pattern: torch.Tensor) -> torch.Tensor:
        return -(pattern * pattern.clamp_min(1e-9).log()).sum(-1).transpose(1, 2)

    transforms = [
        flexcache.Transform("entropy", "pattern", entropy),
        flexcache.Transform("neurons", "mlp_post", lambda x: x.topk(3, dim=-1).values, layers=[1]),
    ]
    model = loaded("llama", tp_size=2)
    model.set_attn_implementation("eager")
    plain = tiny("llama")
    plain.set_attn_implementation("eager")
    compare(model, plain, exact=False, sites=[], transforms=transforms)


@check(2)
def gradients_under_tensor_parallel() -> None:
    sites = ["resid_post", "resid_post.grad", "mlp_post.grad", "model.layers.2.mlp.grad"]
    compare(loaded("llama", tp_size=2), tiny("llama"), exact=False, sites=sites)
    compare(shard(tiny("llama")), tiny("llama"), exact=False, sites=sites)
    compare(shard(tiny("llama"), sequence=True), tiny("llama"), exact=False, sites=sites)


@check(2)
def a_pipeline_of_transformers() -> None:
    norms = flexcache.Transform("norm", "resid_post", partial(torch.linalg.vector_norm, dim=-1))
    compare(loaded("llama", pp_size=2), tiny("llama"), exact=True, transforms=[norms])
    model = loaded("llama", pp_size=2)
    with pytest.raises(ConfigError, match="gradients cannot be captured through a pipeline"):
        flexcache.capture(model, None, DOCUMENTS, "none.zarr", sites="resid_post.grad", **OPTIONS)


def stages(model: nn.Module, count: int, mine: list[int], group: Any = None) -> list[Any]:
    return [PipelineStage(halves(model, count, n), n, count, torch.device("cpu"), group=group) for n in mine]


@check(2)
def a_pipeline_of_torch() -> None:
    """Without a mask, since stages take none: sums over padded keys are then taken in another order."""
    rank = dist.get_rank()
    compare(stages(tiny("llama"), 2, [rank])[0], tiny("llama"), exact=False)
    compare(stages(tiny("llama"), 4, [rank, rank + 2]), tiny("llama"), exact=False)


@check(2)
def stages_of_a_model_that_needs_a_mask_are_refused() -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.is_causal = False
    with folder() as place, pytest.raises(LayoutError, match="takes no attention mask, and needs one"):
        flexcache.capture(stages(model, 2, [dist.get_rank()]), None, DOCUMENTS, place / "run.zarr", **OPTIONS)


@check(4)
def a_pipeline_of_torch_with_tensor_parallel_and_with_fsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "other"))
    group, stage = mesh["pp"].get_group(), mesh["pp"].get_local_rank()
    compare(stages(shard(tiny("llama"), mesh=mesh["other"]), 2, [stage], group), tiny("llama"), exact=False)
    made = stages(tiny("llama"), 2, [stage], group)
    for block in made[0].submod.model.layers.values():
        fully_shard(block, mesh=mesh["other"])
    fully_shard(made[0].submod, mesh=mesh["other"])
    compare(made, tiny("llama"), exact=False)


# The same model on several ranks


@check(2)
def copies_with_and_without_a_wrapper() -> None:
    compare(tiny("llama"), tiny("llama"), exact=True)
    compare(DistributedDataParallel(tiny("llama")), tiny("llama"), exact=True)


@check(2, 3)
def fsdp2() -> None:
    """Units run out on one rank before they do on the other, which still needs its weights."""
    compare(sharded(tiny("llama")), tiny("llama"), exact=True, layers=[0, 1], sites=["resid_post"])
    compare(sharded(tiny("llama")), tiny("llama"), exact=True, documents=MANY_DOCUMENTS)


@check(2)
def fsdp2_goes_on_training_with_the_weights_it_has() -> None:
    """A forward that is left early leaves nothing behind that a later step would compute with."""
    model = sharded(tiny("llama"))
    weights = list(model.parameters())  # as an optimizer holds them
    with folder() as place:
        flexcache.capture(model, None, DOCUMENTS, place / "run.zarr", layers=[1], **OPTIONS)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        for parameter in weights:
            parameter.mul_(1.5)
        found = model(input_ids=ids).logits
        plain = tiny("llama")
        for parameter in plain.parameters():
            parameter.mul_(1.5)
        assert torch.allclose(found, plain(input_ids=ids).logits, atol=1e-4)


@check(2)
def gradients_under_fsdp2() -> None:
    compare(sharded(tiny("llama")), tiny("llama"), exact=False, sites=["resid_post", "resid_post.grad"])


@check(2)
def fsdp1() -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = FullyShardedDataParallel(block, **options)
    compare(FullyShardedDataParallel(model, **options), tiny("llama"), exact=True)


@check(2)
def a_changed_model_is_refused_on_every_rank() -> None:
    """One value of one weight, or a hook that steers, in the last block: in a pipeline, one rank alone has it."""

    def fsdp1(model: nn.Module, whole: bool) -> nn.Module:
        options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": whole}
        model.model.layers[3] = FullyShardedDataParallel(model.model.layers[3], **options)
        return FullyShardedDataParallel(model, **options)

    ways: dict[str, Any] = {
        "fsdp2": sharded,
        "fsdp1": partial(fsdp1, whole=True),
        "fsdp1-flat": partial(fsdp1, whole=False),
        "tensor": shard,
        "pipeline": lambda model: stages(model, 2, [dist.get_rank()])[0],
    }
    options = {**OPTIONS, "sites": ["resid_post"]}
    with folder() as place:
        for name, distribute in ways.items():
            path = place / f"{name}.zarr"
            flexcache.capture(distribute(tiny("llama")), None, DOCUMENTS, path, **options)
            dist.barrier()
            edited = tiny("llama")
            edited.model.layers[3].mlp.up_proj.weight.data[5, 5] += 1
            with pytest.raises(MismatchError, match=r"(?s)weights: 1 of .*layers\.3\.mlp\.up_proj"):
                flexcache.capture(distribute(edited), None, DOCUMENTS, path, **options)
            steered = distribute(tiny("llama"))
            for key, module in modules_by_path(as_one_module(steered)).items():
                if key == "model.layers.3":
                    module.register_forward_hook(lambda module, args, output: output * 1.5)
            with pytest.raises(MismatchError, match=r"outputs on a fixed input.*layers\.3 is the first"):
                flexcache.capture(steered, None, DOCUMENTS, path, **options)
            dist.barrier()


@check(2, slow=True)
def deepspeed_zero() -> None:
    for engine in zero_engines():
        compare(engine, tiny("llama"), exact=True)


# Both


@check(4)
def fsdp2_and_tensor_parallel() -> None:
    compare(loaded("llama", fsdp_size=2, tp_size=2), tiny("llama"), exact=False)


@check(4)
def copies_of_a_tensor_parallel_model() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "tp"))
    compare(shard(tiny("llama"), mesh=mesh["tp"]), tiny("llama"), exact=False)
