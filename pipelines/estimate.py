"""flexcache estimate: bytes, files, hours, memory and cost of a capture, from a sample and a short try."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flexcache.errors import ConfigError
from flexcache.recording.planning.length_sampling import Sampled, sample
from flexcache.recording.planning.planning import Source
from flexcache.store.format.text import size
from flexcache.store.manage.disk_benchmark import write_rate
from flexcache.store.manage.footprint import Footprint, footprint
from pipelines.config import CaptureConfig
from pipelines.plan import place_of, source_of, table_of

if TYPE_CHECKING:
    from flexcache.recording.forward.capture_targets import CaptureTargets
    from flexcache.recording.planning.throughput import Trial
    from flexcache.recording.run.progress import CaptureProgress


@dataclass(frozen=True)
class Terms:
    """What is known or chosen beside the configuration.

    Attributes
    ----------
    sample : int
        Documents to tokenize.
    seconds : float
        For which the model is tried.
    tokens_per_second : float or None
        Of one process, padding included; None to try the model.
    write_rate : float or None
        Bytes a second of the disk; None to measure it.
    processes : int
    price_hour, price_tb_month : float or None
        Of one process for an hour, and of 10¹² bytes for a month.
    seed : int
    """

    sample: int = 2048
    seconds: float = 10.0
    tokens_per_second: float | None = None
    write_rate: float | None = None
    processes: int = 1
    price_hour: float | None = None
    price_tb_month: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Forecast:
    """What a capture would take."""

    config: CaptureConfig
    terms: Terms
    source: Source
    sampled: Sampled
    footprint: Footprint
    trial: Trial | None
    weight_bytes: int
    write_rate: float

    @property
    def bytes(self) -> int:
        """Of the whole store, before compression."""
        return self.footprint.shard_bytes + self.footprint.ledger_bytes + self.sampled.table_bytes

    @property
    def rows_error(self) -> float:
        """Two standard errors of rows and bytes, as a share of them."""
        return self.sampled.error if self.source.spec.rows in ("all", "some") else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second of one process, padding included."""
        return self.terms.tokens_per_second or (self.trial.rate if self.trial else 0.0)

    @cached_property
    def model_hours(self) -> float:
        """Of each process, in the forward."""
        return self.sampled.amount.tokens_padded / self.rate / self.terms.processes / 3600

    @cached_property
    def disk_hours(self) -> float:
        """That the disk needs for the bytes."""
        return self.bytes / self.write_rate / 3600

    @property
    def hours(self) -> float:
        """Of the whole capture: the forward runs while the disk writes, so the longer of the two."""
        return max(self.model_hours, self.disk_hours)

    @property
    def hours_error(self) -> float:
        """Two standard errors of the hours in the forward, as a share of them."""
        trial = self.trial.error if self.trial else 0.0
        return float((self.sampled.error**2 + trial**2) ** 0.5)

    @property
    def host_bytes(self) -> int:
        """Memory of one process: the peak of the try, or else the weights; and the buffer."""
        held = self.trial.host_bytes if self.trial else self.weight_bytes
        return held + (self.config.buffer_mb << 20)

    @property
    def free(self) -> int:
        """Bytes free where the store will be."""
        return shutil.disk_usage(place_of(self.config.store)).free

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: bytes, hours, and shares between 0 and 1."""
        prices = {"compute": self._compute(), "storage_month": self._storage()}
        return {
            "plan": asdict(self.sampled.amount),
            "sample": {"documents": self.sampled.documents, "tokens_error": self.sampled.error},
            "bytes": {
                "total": self.bytes,
                "shards": self.footprint.shard_bytes,
                "tables": self.sampled.table_bytes,
                "ledger": self.footprint.ledger_bytes,
                "error": self.rows_error,
                "free": self.free,
            },
            "inodes": {"files": self.footprint.files, "folders": self.footprint.folders},
            "tokens_per_second": self.rate,
            "trial": None if self.trial is None else asdict(self.trial),
            "write_rate": self.write_rate,
            "processes": self.terms.processes,
            "hours": {
                "total": self.hours,
                "model": self.model_hours,
                "disk": self.disk_hours,
                "error": self.hours_error,
            },
            "memory": {
                "host": self.host_bytes,
                "device": None if self.trial is None else self.trial.device_bytes,
                "weights": self.weight_bytes,
            },
            "cost": {name: value for name, value in prices.items() if value is not None},
        }

    def table(self) -> Table:
        """Return everything for people."""
        table = table_of("estimate", self.config, self.source)
        amount = dict(self.sampled.amount.lines())
        within = f" ± {self.rows_error:.1%}" if self.rows_error else ""
        known = "all" if not self.sampled.error else f"{self.sampled.documents:,}"
        amount["documents"] += f"; {known} tokenized"
        if self.sampled.error:
            amount["tokens"] += f" ± {self.sampled.error:.1%}"
        amount["rows"] += within
        amount["bytes"] = f"{size(self.bytes)}{within}" + (
            ", before compression" if self.source.spec.compression != "none" else ""
        )
        amount["bytes"] += f"; tables {size(self.sampled.table_bytes)}, ledger {size(self.footprint.ledger_bytes)}"
        amount["files"] = f"{self.footprint.files:,}, and {self.footprint.folders:,} folders"
        fits = "" if self.bytes <= self.free else ": too little"
        lines = {
            **amount,
            "free disk": size(self.free) + fits,
            "model": self._model_line(),
            "disk": f"{size(self.write_rate)}/s: {duration(self.disk_hours)}",
            "time": self._time_line(),
            "memory": self._memory_line(),
            **self._cost_lines(),
        }
        for name, value in lines.items():
            table.add_row(name, value)
        return table

    def _model_line(self) -> str:
        text = f"{self.rate:,.0f} tokens/s with padding"
        if self.trial is not None:
            text += f" ± {self.trial.error:.1%} ({self.trial.batches} batches in {self.trial.seconds:.1f} s)"
        return f"{text}: {duration(self.model_hours)}"

    def _time_line(self) -> str:
        by = "the model" if self.model_hours >= self.disk_hours else "the disk"
        error = f" ± {self.hours_error:.1%}" if self.hours_error and by == "the model" else ""
        many = self.terms.processes
        beside = f", {many} processes side by side, if they do not slow each other" if many > 1 else ""
        return f"{duration(self.hours)}{error}, bound by {by}{beside}"

    def _memory_line(self) -> str:
        held = f"peak of the try {size(self.trial.host_bytes)}" if self.trial else f"weights {size(self.weight_bytes)}"
        text = f"{size(self.host_bytes)} a process: {held}, buffer {size(self.config.buffer_mb << 20)}"
        if self.trial is None:
            return text + "; activations of a forward come on top"
        return text + (f"; of the device {size(self.trial.device_bytes)}" if self.trial.device_bytes else "")

    def _compute(self) -> float | None:
        price = self.terms.price_hour
        return None if price is None else price * self.hours * self.terms.processes

    def _storage(self) -> float | None:
        price = self.terms.price_tb_month
        return None if price is None else price * self.bytes / 1e12

    def _cost_lines(self) -> dict[str, str]:
        compute, storage = self._compute(), self._storage()
        lines = {}
        if compute is not None:
            hours = self.hours * self.terms.processes
            lines["cost of the capture"] = f"{compute:,.2f} ({duration(hours)} at {self.terms.price_hour:g} an hour)"
        if storage is not None:
            lines["cost of keeping it"] = f"{storage:,.2f} a month (at {self.terms.price_tb_month:g} a terabyte)"
        return lines


def run(config: CaptureConfig, terms: Terms, progress: bool = True) -> Forecast:
    """Tokenize a sample of the corpus, try the model and the disk, and say what the whole would take; nothing is kept.

    Raises
    ------
    ConfigError
        A model over several processes is not tried: its tokens a second must be given.
    CaptureError, RangeError
        The try failed as the capture would.
    """
    import transformers

    from flexcache.recording.run.progress import CaptureProgress

    spread = config.model.parallel
    if terms.tokens_per_second is None and spread.tensor * spread.fsdp * spread.pipeline > 1:
        raise ConfigError(
            "a model that is spread over several processes is not tried",
            expected="--tokens-per-second, as a short capture of it shows",
        )
    skeleton = config.skeleton()
    source = source_of(config, skeleton)
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    with tempfile.TemporaryDirectory(prefix="flexcache-estimate-") as folder, CaptureProgress(progress) as bars:
        if not progress:
            transformers.utils.logging.disable_progress_bar()
        model = config.load_model() if terms.tokens_per_second is None else None
        source = source if model is None else _batched(model, config, source)
        sampled = sample(source, Path(folder), terms.sample, terms.seed, bars.planning(None))
        trial = None if model is None else _try(model, config, terms, source, sampled, bars)
    amount = sampled.amount
    return Forecast(
        config=config,
        terms=terms,
        source=source,
        sampled=sampled,
        footprint=footprint(source.arrays, amount.rows, amount.shard_rows),
        trial=trial,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        write_rate=terms.write_rate or write_rate(place_of(config.store)),
    )


def _batched(model: Any, config: CaptureConfig, source: Source) -> Source:
    """Return the source with the batches that a capture would plan for the model."""
    from flexcache.model import evaluating
    from flexcache.recording.checks.padding import find_batching
    from flexcache.recording.forward.image_inputs import padding
    from flexcache.recording.run.model_parallel_group import ModelParallelGroup

    with evaluating(model), closing(ModelParallelGroup(model)) as group:
        pad = padding(model, source.tokenizer)
        verdict = find_batching(model, _reading(model, config, source), pad, source.spec, group)
    return replace(source, batching=verdict.batching)


def _reading(model: Any, config: CaptureConfig, source: Source) -> CaptureTargets:
    from flexcache.hooks.read.measure import input_device
    from flexcache.recording.forward.capture_targets import find_targets

    return find_targets(model, source.spec, **config.functions(source.tokenizer, input_device(model)))


def _try(
    model: Any, config: CaptureConfig, terms: Terms, source: Source, sampled: Sampled, bars: CaptureProgress
) -> Trial:
    from flexcache.recording.forward.image_inputs import padding
    from flexcache.recording.planning.throughput import try_batches

    targets, pad = _reading(model, config, source), padding(model, source.tokenizer)
    advance = bars.trying(terms.seconds)
    return try_batches(model, targets, sampled.plan, pad, seconds=terms.seconds, seed=terms.seed, progress=advance)


def duration(hours: float) -> str:
    """Write a time for people.

    >>> duration(0.002), duration(0.5), duration(5.25), duration(100)
    ('7.2 s', '30.0 min', '5.2 h', '4.2 days')
    """
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
