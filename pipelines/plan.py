"""flexcache plan: compute the size of a capture, and whether it fits, without loading weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexcache.paths import shown
from flexcache.recording.planning.planning import Estimate, PlanInputs, estimate
from flexcache.store.format.text import size
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation, local
from flexcache.store.write.create import check_free_space
from pipelines.config import CaptureConfig


def run(config: CaptureConfig, console: Console, progress: bool = True) -> Estimate:
    """Print the numbers of a plan; the corpus is tokenized, and nothing is kept.

    Raises
    ------
    PlanError
        The disk has no room for the store.
    """
    from flexcache.recording.run.progress import CaptureProgress

    inputs = plan_inputs(config, config.skeleton())
    with CaptureProgress(progress) as bars:
        amount = estimate(inputs, bars.planning(inputs.documents.count))
    table = table_of("plan", config, inputs)
    for name, value in amount.lines():
        table.add_row(name, value)
    if (folder := disk_path(config.store)) is not None:
        table.add_row("free disk", size(shutil.disk_usage(existing_folder(folder)).free))
    if len(config.stores) > 1:
        table.add_row("stores", f"{len(config.stores)} of this size, {size(len(config.stores) * amount.bytes)} in all")
    console.print(table)
    check_free_space(config.store, len(config.stores) * amount.bytes)
    return amount


def plan_inputs(config: CaptureConfig, skeleton: Any) -> PlanInputs:
    """Return the inputs of the plan of a configuration, from a model without weights; no document is read."""
    from flexcache.documents import open_documents
    from flexcache.hooks.locate.position_tables import count_positions, longest_input
    from flexcache.hooks.locate.vision import reads_images
    from flexcache.hooks.locate.vocabulary import encoder_vocabulary_size, vocabulary_size
    from flexcache.identity.tokenizer import describe_tokenizer
    from flexcache.images.input import model_input
    from flexcache.recording.forward.capture_targets import find_targets, measure_arrays
    from flexcache.recording.forward.image_inputs import check_images

    documents = open_documents(config.open_documents(), images_first=reads_images(skeleton))
    tokenizer = model_input(skeleton, config.load_tokenizer(documents), documents.content)
    spec = config.spec(skeleton).within(longest_input(skeleton, tokenizer))
    spec.check()
    targets = find_targets(skeleton, spec, **config.functions(tokenizer))
    example = check_images(skeleton, spec, targets, tokenizer)
    return PlanInputs(
        documents=documents,
        tokenizer=tokenizer,
        arrays=measure_arrays(skeleton, spec, targets, example=example),
        spec=spec,
        model={"name": config.model.name},
        tokenizer_identity=describe_tokenizer(tokenizer, documents.content == "messages", spec.chat),
        vocabulary=vocabulary_size(skeleton),
        encoder_vocabulary=encoder_vocabulary_size(skeleton),
        positions=count_positions(skeleton),
    )


def table_of(kind: str, config: CaptureConfig, inputs: PlanInputs) -> Table:
    """Return a table with a line for each array of the store."""
    table = Table(title=f"{kind} of {shown(config.store)}", title_justify="left", show_header=False, box=None)
    for array in inputs.arrays:
        layers = "" if array.layers is None else f"{len(array.captured)} of {array.depth} layers, "
        layers += f"{len(array.virtual)} of them virtual, " if array.virtual else ""
        table.add_row(array.name, f"{layers}{array.features} × {array.dtype}, {size(array.row_bytes)} a row")
    return table


def existing_folder(store: StoreLocation) -> Path:
    """Return the nearest existing folder that will contain a store.

    Raises
    ------
    StoreError
        The store will be on object storage.
    """
    path = local(
        store, "measuring a disk", remedy="give a local path instead; all numbers except those of the disk are the same"
    )
    return next(parent for parent in path.absolute().parents if parent.exists())
