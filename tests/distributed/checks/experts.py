"""Sites of experts of models on several processes, held against the store of a single one."""

from __future__ import annotations

import pytest

import flexcache
from flexcache.errors import FlexCacheError
from tests.distributed.checks.capturing import DOCUMENTS, OPTIONS, compare, folder, loaded, sharded
from tests.distributed.registry import check
from tests.models import tiny

SHARED = ["expert_out", "expert_index", "expert_weight", "mlp_out"]


@check(2)
def experts_under_tensor_parallel() -> None:
    model = loaded("mixtral", tp_size=2)
    compare(model, tiny("mixtral"), exact=False, sites=SHARED)
    with folder() as place, pytest.raises(FlexCacheError, match="where several processes share their weights"):
        flexcache.capture(model, None, DOCUMENTS, place / "run.zarr", sites=["mlp_post"], **OPTIONS)


@check(2)
def experts_under_expert_parallel() -> None:
    model = loaded("qwen3_moe", tp_size=2, ep_size=2)
    compare(model, tiny("qwen3_moe"), exact=False, sites=SHARED)
    with folder() as place, pytest.raises(FlexCacheError, match="where several processes share their weights"):
        flexcache.capture(model, None, DOCUMENTS, place / "run.zarr", sites=["mlp_post"], **OPTIONS)


@check(2)
def experts_under_fsdp() -> None:
    compare(sharded(tiny("mixtral")), tiny("mixtral"), exact=False, sites=[*SHARED, "mlp_post"])


@check(2)
def experts_in_a_pipeline() -> None:
    compare(loaded("mixtral", pp_size=2), tiny("mixtral"), exact=False, sites=[*SHARED, "mlp_post"])
