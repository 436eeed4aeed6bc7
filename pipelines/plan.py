"""flexcache plan: what a capture would cost, and whether it fits, without loading weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flexcache.recorder.planning import Estimate, Source, estimate
from flexcache.store.create import check_room
from flexcache.store.display import size
from pipelines.config import CaptureConfig


def run(config: CaptureConfig, console: Console, progress: bool = True) -> Estimate:
    """Print the plan in numbers; the corpus is tokenized, and nothing is kept.

    Raises
    ------
    PlanError
        The disk has no room for the store.
    """
    from flexcache.model import describe_tokenizer, longest_input, vocabulary
    from flexcache.recorder.progress import CaptureProgress
    from flexcache.recorder.reading import locate, measure_arrays

    documents = config.documents.open()
    model = config.model.skeleton()
    tokenizer = config.load_tokenizer(documents)
    spec = config.spec()
    spec = spec.model_copy(update={"max_length": spec.max_length or longest_input(model, tokenizer)})
    source = Source(
        documents=documents,
        tokenizer=tokenizer,
        arrays=measure_arrays(model, spec, locate(model, spec, **config.functions(tokenizer))),
        spec=spec,
        model={"name": config.model.name},
        tokenizer_identity=describe_tokenizer(tokenizer),
        vocabulary=vocabulary(model),
    )
    with CaptureProgress(progress) as bars:
        amount = estimate(source, bars.planning(documents.count))
    console.print(_table(config, source, amount))
    check_room(config.store, amount.bytes)
    return amount


def _table(config: CaptureConfig, source: Source, amount: Estimate) -> Table:
    table = Table(title=f"plan of {config.store}", title_justify="left", show_header=False, box=None)
    for array in source.arrays:
        layers = "" if array.layers is None else f"{len(array.layers)} of {array.depth} layers, "
        table.add_row(array.name, f"{layers}{array.features} × {array.dtype}, {size(array.row_bytes)} a row")
    for name, value in amount.lines():
        table.add_row(name, value)
    place = next(parent for parent in Path(config.store).absolute().parents if parent.exists())
    table.add_row("free disk", size(shutil.disk_usage(place).free))
    return table
