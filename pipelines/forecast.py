"""The estimated cost of a capture: bytes, files, hours, memory and money."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flexcache.array_spec import blocks_to_run
from flexcache.recording.planning.length_sampling import Sampled
from flexcache.recording.planning.planning import PlanInputs
from flexcache.store.format.text import size
from flexcache.store.manage.footprint import Footprint
from pipelines.config import CaptureConfig
from pipelines.config.forecast_terms import ForecastTerms
from pipelines.plan import existing_folder, table_of

if TYPE_CHECKING:
    from flexcache.recording.planning.throughput import Trial


@dataclass(frozen=True)
class Forecast:
    """The estimated cost of a capture.

    Attributes
    ----------
    weight_bytes : int
        Bytes of the weights of the model.
    write_rate : float
        Bytes a second that the disk writes.
    """

    config: CaptureConfig
    terms: ForecastTerms
    inputs: PlanInputs
    sampled: Sampled
    footprint: Footprint
    trial: Trial | None
    weight_bytes: int
    write_rate: float

    @property
    def bytes(self) -> int:
        """Bytes of the whole store, before compression."""
        return self.footprint.shard_bytes + self.footprint.ledger_bytes + self.sampled.table_bytes

    @property
    def rows_error(self) -> float:
        """Two standard errors of rows and bytes, relative to them."""
        return self.sampled.error if self.inputs.spec.rows in ("all", "some") else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second of one process, padding included."""
        return self.terms.tokens_per_second or (self.trial.rate if self.trial else 0.0)

    @cached_property
    def model_hours(self) -> float:
        """Hours of each process in the forward pass."""
        return self.sampled.amount.tokens_padded / self.rate / self.terms.processes / 3600

    @cached_property
    def disk_hours(self) -> float:
        """Hours that the disk needs to write the store."""
        return self.bytes / self.write_rate / 3600

    @property
    def hours(self) -> float:
        """Hours of the whole capture: the longer of forward passes and writing, which overlap."""
        return max(self.model_hours, self.disk_hours)

    @property
    def hours_error(self) -> float:
        """Two standard errors of the hours in the forward pass, relative to them."""
        trial = self.trial.error if self.trial else 0.0
        return float((self.sampled.error**2 + trial**2) ** 0.5)

    @property
    def host_bytes(self) -> int:
        """Bytes of memory of one process: the peak of the trial, or else the weights, and the buffer."""
        held = self.trial.host_bytes if self.trial else self.weight_bytes
        return held + self.config.buffer_bytes

    @property
    def free(self) -> int:
        """Bytes that are free on the disk of the store."""
        return shutil.disk_usage(existing_folder(self.config.store)).free

    @cached_property
    def blocks(self) -> dict[tuple[str, int], int]:
        """Blocks that recompute each virtual layer, by array and layer; empty if all layers are on disk."""
        return blocks_to_run(self.inputs.arrays)

    def read_seconds(self, blocks: float) -> float:
        """Seconds in which one process recomputes a million rows by some blocks, at the rate of the whole forward."""
        depth = max((array.depth or 1 for array in self.inputs.arrays), default=1)
        return 1e6 / self.rate * blocks / depth

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as plain values: bytes, hours, and errors between 0 and 1."""
        prices = {"compute": self._compute(), "storage_month": self._storage()}
        return {
            "plan": self.sampled.amount.to_json(),
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
            **self._virtual_json(),
            "cost": {name: value for name, value in prices.items() if value is not None},
        }

    def table(self) -> Table:
        """Return all numbers as a table."""
        table = table_of("estimate", self.config, self.inputs)
        amount = dict(self.sampled.amount.lines())
        within = f" ± {self.rows_error:.1%}" if self.rows_error else ""
        known = "all" if not self.sampled.error else f"{self.sampled.documents:,}"
        amount["documents"] += f"; {known} tokenized"
        if self.sampled.error:
            amount["tokens"] += f" ± {self.sampled.error:.1%}"
        amount["rows"] += within
        amount["bytes"] = f"{size(self.bytes)}{within}" + (
            ", before compression" if self.inputs.spec.compression != "none" else ""
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
            **self._virtual_lines(),
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
        processes = f", {many} processes at the same time, if they do not slow each other" if many > 1 else ""
        return f"{duration(self.hours)}{error}, bound by {by}{processes}"

    def _memory_line(self) -> str:
        held = (
            f"peak of the trial {size(self.trial.host_bytes)}" if self.trial else f"weights {size(self.weight_bytes)}"
        )
        text = f"{size(self.host_bytes)} a process: {held}, buffer {size(self.config.buffer_bytes)}"
        if self.trial is None:
            return text + "; activations of a forward come on top"
        return text + (f"; of the device {size(self.trial.device_bytes)}" if self.trial.device_bytes else "")

    def _virtual_json(self) -> dict[str, Any]:
        """Return the price of reading virtual layers: blocks and seconds a million rows, by site and layer."""
        found: dict[str, dict[str, Any]] = {}
        for (name, layer), blocks in self.blocks.items():
            found.setdefault(name, {})[str(layer)] = {"blocks": blocks, "seconds": self.read_seconds(blocks)}
        return {"virtual": found} if found else {}

    def _virtual_lines(self) -> dict[str, str]:
        if not self.blocks:
            return {}
        counts, arrays, rows = [*self.blocks.values()], self.inputs.arrays, self.sampled.amount.rows
        mean = sum(counts) / len(counts)
        more = sum(array.row_bytes * len(array.virtual) for array in arrays) * rows
        whole = more + sum(array.row_bytes * len(array.slices) for array in arrays) * rows
        return {
            "virtual layers": f"{len(counts)}, which would take {size(more)}: the store has {1 - more / whole:.2f} of"
            " the bytes of all layers",
            "reading them": f"{mean:.1f} blocks a row on average, {max(counts)} at most:"
            f" {self.read_seconds(mean):,.1f} s a million rows, {self.read_seconds(max(counts)):,.1f} s at most",
        }

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


def duration(hours: float) -> str:
    """Format a time.

    >>> duration(0.002), duration(0.5), duration(5.25), duration(100)
    ('7.2 s', '30.0 min', '5.2 h', '4.2 days')
    """
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
