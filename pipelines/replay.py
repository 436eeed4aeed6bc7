"""flexcache replay: edit activations of a store, run the rest of the model on them, and write a report."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from analysis.rescue import write_or_rescue
from flexcache.paths import output_folder, shown
from pipelines.config.replay_config import ReplayConfig, donors, make_edit, read_answers


def run(
    store_path: Path,
    config: ReplayConfig,
    config_path: Path,
    output: Path | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> Path:
    """Run a sweep, print its table, and write ``results.zarr``, plots and ``report.html``; the same call resumes it.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    ConfigError, MismatchError, AnalysisError
        See `analysis.replay.sweeps.sweep`.
    """
    import torch

    import flexcache
    from analysis import replay
    from analysis.report import replayed

    console = console or Console()
    folder = output_folder(output or Path("replays") / f"{config_path.stem}")
    store = flexcache.open(store_path)
    recorded = next(iter(store.ledger), None)
    threads = config.threads or (recorded.fingerprint.get("threads") if recorded else 0)
    if threads:  # the bits of bfloat16 results depend on the number of threads
        torch.set_num_threads(int(threads))
    tokenizer = config.model.tokenizer() if _has_text(config.answers) else None
    answers = read_answers(config.answers, tokenizer)
    depth = max((array.depth or 0 for array in store.arrays.values()), default=0)
    edits = [make_edit(store, config.at, depth, given, str(config_path)) for given in config.edits]
    names = config.documents
    if isinstance(names, int):
        names = [str(name) for name in store.documents["id"].to_pylist()[:names]]
    model = config.model.load()
    sweep = replay.sweep(
        store,
        config.model.load if config.scheduler else model,
        config.at.grid(),
        edits,
        config.metrics,
        config.baselines,
        answers=answers,
        documents=names,
        readout=config.readout,
        copies=config.copies,
        seed=config.seed,
        accept=config.accept,
        folder=folder,
        scheduler=config.scheduler,
        workers=config.workers,
        progress=progress,
    )
    exact = None
    if config.attribution is not None:
        asked = config.attribution
        found = replay.attribution(store, donors(store, asked.donors), config.at.site, asked.method)
        exact = replay.verify(store, model, found, asked.top, accept=config.accept)
    console.print(sweep.table())
    error = float(sweep.results["identity_error"].max())
    console.print(
        f"identity error: {error:.3g} at most (logits of a replay without edits minus those of the forward pass)"
    )
    for note in sweep.results.attrs["notes"]:
        console.print(note, style="yellow", markup=False)
    command = shlex.join(["flexcache", "replay", shown(store.path), str(config_path), "--output", shown(folder)])

    def write(place: Path) -> Path:
        for metric in sweep.metrics:
            sweep.plot(place / f"{metric}.png", metric)
        return replayed.write(store, sweep, place / "report.html", exact=exact, command=command, groups=config.groups)

    page = write_or_rescue(write, folder)
    for what, path in (("report", page), ("pictures", folder), ("numbers", folder / "results.zarr")):
        console.print(f"{what:<8} {shown(path)}", markup=False, highlight=False, soft_wrap=True)
    return page


def _has_text(answers: object) -> bool:
    if isinstance(answers, dict):
        return any(_has_text(pair) for pair in answers.values())
    return isinstance(answers, list) and any(isinstance(token, str) for token in answers)
