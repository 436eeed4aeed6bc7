"""flexcache estimate: estimate the cost of a capture from a sample and short trials."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexcache.errors import ConfigError
from flexcache.recording.planning.length_sampling import Sampled, sample
from flexcache.recording.planning.planning import PlanInputs
from flexcache.store.manage.disk_benchmark import write_rate
from flexcache.store.manage.footprint import footprint
from pipelines.config import CaptureConfig
from pipelines.config.forecast_terms import ForecastTerms
from pipelines.forecast import Forecast
from pipelines.plan import existing_folder, plan_inputs

if TYPE_CHECKING:
    from flexcache.recording.forward.capture_targets import CaptureTargets
    from flexcache.recording.planning.throughput import Trial
    from flexcache.recording.run.progress import CaptureProgress


def run(config: CaptureConfig, terms: ForecastTerms, progress: bool = True) -> Forecast:
    """Estimate a capture from a sample of the corpus and short trials of the model and the disk; nothing is kept.

    Raises
    ------
    ConfigError
        The model is spread over several processes, and its tokens a second are not given.
    CaptureError, RangeError
        The trial failed as the capture would.
    """
    import transformers

    from flexcache.recording.run.progress import CaptureProgress

    if config.model.adapters is not None:
        raise ConfigError(
            "an estimate is for one model, and there are several variants",
            where="model.adapters",
            remedy="estimate the base model: --set model.adapters=null; each store has its size, and `plan` counts all",
        )
    spread = config.model.parallel
    if terms.tokens_per_second is None and spread.tensor * spread.fsdp * spread.pipeline > 1:
        raise ConfigError(
            "a model that is spread over several processes is not tried",
            expected="--tokens-per-second, as a short capture of it shows",
        )
    skeleton = config.skeleton()
    inputs = plan_inputs(config, skeleton)
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    with tempfile.TemporaryDirectory(prefix="flexcache-estimate-") as folder, CaptureProgress(progress) as bars:
        if not progress:
            transformers.utils.logging.disable_progress_bar()
        model = config.load_model() if terms.tokens_per_second is None else None
        inputs = inputs if model is None else _batched(model, config, inputs)
        sampled = sample(inputs, Path(folder), terms.sample, terms.seed, bars.planning(None))
        trial = None if model is None else _run_trial(model, config, terms, inputs, sampled, bars)
    amount = sampled.amount
    batches = -(-amount.tokens_padded // (amount.units * inputs.spec.batch_tokens))
    return Forecast(
        config=config,
        terms=terms,
        inputs=inputs,
        sampled=sampled,
        footprint=footprint(inputs.arrays, amount.rows, amount.shard_rows, batches=batches),
        trial=trial,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        write_rate=terms.write_rate * 1e6 if terms.write_rate else write_rate(existing_folder(config.store)),
    )


def _batched(model: Any, config: CaptureConfig, inputs: PlanInputs) -> PlanInputs:
    """Return the inputs with the batching that a capture would use for the model."""
    from flexcache.hooks.locate.evaluation_mode import evaluation_mode
    from flexcache.recording.checks.padding import find_batching
    from flexcache.recording.forward.image_inputs import padding
    from flexcache.recording.run.model_parallel_group import ModelParallelGroup

    with evaluation_mode(model), closing(ModelParallelGroup(model)) as group:
        pad = padding(model, inputs.tokenizer)
        verdict = find_batching(model, _targets(model, config, inputs), pad, inputs.spec, group)
    return replace(inputs, batching=verdict.batching)


def _targets(model: Any, config: CaptureConfig, inputs: PlanInputs) -> CaptureTargets:
    from flexcache.hooks.read.measure import input_device
    from flexcache.recording.forward.capture_targets import find_targets

    return find_targets(model, inputs.spec, **config.functions(inputs.tokenizer, input_device(model)))


def _run_trial(
    model: Any, config: CaptureConfig, terms: ForecastTerms, inputs: PlanInputs, sampled: Sampled, bars: CaptureProgress
) -> Trial:
    from flexcache.recording.forward.image_inputs import padding
    from flexcache.recording.planning.throughput import try_batches

    targets, pad = _targets(model, config, inputs), padding(model, inputs.tokenizer)
    advance = bars.trying(terms.seconds)
    return try_batches(model, targets, sampled.plan, pad, seconds=terms.seconds, seed=terms.seed, progress=advance)
