"""The model that benchmarks run: SmolLM2-135M, in the narrowest dtype that the processor computes quickly."""

from __future__ import annotations

from flexcache.cpu import has_native_bfloat16
from flexcache.model import ModelSource
from pipelines.demo import assets

DTYPE = "bfloat16" if has_native_bfloat16() else "float32"
"""Without instructions for bfloat16 the forward would take 40 times as long, and hide everything else."""


def smollm2(dtype: str = DTYPE) -> ModelSource:
    """Return SmolLM2-135M-Instruct on the CPU."""
    return ModelSource.model_validate({"name": str(assets.smollm2()), "dtype": dtype, "device": "cpu"})
