"""flexcache verify: check every file of a store against its checksum, and units against the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from flexcache.store.format.text import size
from flexcache.store.manage.verify import Verification, verify
from flexcache.store.read.display import array_bytes
from flexcache.store.read.store import Store
from pipelines.commands.bars import files_bar
from pipelines.config import CaptureConfig

if TYPE_CHECKING:
    from flexcache.recording.recompute import Recomputed


def run(path: Path, console: Console, progress: bool = True) -> Verification:
    """Verify a store and print the damaged files."""
    store = Store(path)
    share = len(store.committed_units) / max(1, store.n_units)
    with files_bar("verifying", progress, int(array_bytes(store) * share)) as bar:
        result = verify(path, bar)
    for finding in result.findings:
        unit = "" if finding.unit is None else f" (unit {finding.unit})"
        console.print(f"[red]✗[/] {escape(finding.file)}{unit} {escape(finding.problem)}", highlight=False)
    state = "complete" if result.committed == result.units else f"{result.committed} of {result.units} units committed"
    virtual = f"; {result.virtual:,} virtual shards have digests" if result.virtual else ""
    console.print(
        f"{result.files:,} files, {size(result.bytes)}: "
        + ("[green]every checksum agrees[/]" if result.sound else f"[red]{len(result.findings)} wrong[/]")
        + f"{virtual}; the store is {state}",
        highlight=False,
    )
    if any(finding.unit is not None for finding in result.findings):
        console.print("flexcache repair retracts the damaged units, so that they are computed again", highlight=False)
    return result


def recompute_units(path: Path, config: CaptureConfig, units: int, console: Console, progress: bool = True) -> bool:
    """Run random units through the model again, print their differences from the stored values, and return success."""
    from flexcache.hooks.read.measure import input_device
    from flexcache.recording.recompute import recompute

    store = Store(path)
    images = store.images  # the store keeps them, with their processor: the files may be gone
    model, tokenizer = config.load_model(), None if images else config.load_tokenizer(config.documents.open())
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not progress) as bars:
        task = bars.add_task("computing again (rows)", total=None)
        found = recompute(
            model,
            path,
            units=units,
            tokenizer=tokenizer,
            **config.functions(tokenizer, input_device(model)),
            progress=lambda rows: bars.advance(task, rows),
        )
    if store.spec.decoding:
        _print_distances(found, console)
        return True
    equal = sum(item.equal for item in found)
    for item in found:
        if not item.equal:
            place = item.site if item.layer is None else f"{item.site}[{item.layer}]"
            mark = "[red]✗[/]" if item.wrong else "[yellow]≠[/]"
            why = "" if item.same_conditions else ", computed under other conditions"
            virtual = item.difference == float("inf")
            off = (
                "its rows do not have the digests" if virtual else f"off by {item.difference:.3g} of its largest value"
            )
            console.print(f"{mark} unit {item.unit}, {escape(place)}: {off}{why}", highlight=False)
    console.print(
        f"{len({item.unit for item in found})} units computed again: "
        f"{equal} of {len(found)} shards are equal, byte for byte",
        highlight=False,
    )
    return not any(item.wrong for item in found)


def _print_distances(found: Sequence[Recomputed], console: Console) -> None:
    """Print how far rows that were read while they were generated are from a run over the whole text, by layer."""
    table = Table("site", "layer", "relative error", "largest difference", box=None, header_style="bold")
    for site, layer in dict.fromkeys((item.site, item.layer) for item in found):
        units = [item for item in found if (item.site, item.layer) == (site, layer)]
        error, largest = (max(getattr(item, name) for item in units) for name in ("relative_error", "difference"))
        table.add_row(site, "" if layer is None else str(layer), f"{error:.2g}", f"{largest:.2g}")
    console.print(table)
    console.print(
        f"{len({item.unit for item in found})} units computed again, each text at once; their rows were read while they"
        " were generated. The relative error is the norm of the differences ÷ the norm of the stored values; the"
        " largest difference is relative to the largest stored value. Each is that of the worst unit",
        highlight=False,
    )
