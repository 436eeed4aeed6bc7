"""flexcache replay: edit activations of a store, run the rest of the model on them, and write a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

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
    from analysis import logit_attribution, replay, saved
    from analysis.readout import contributions
    from analysis.replay.edits.held_out import judged_documents
    from analysis.replay.gradients.attribution import check_attribution
    from analysis.replay.gradients.objectives import stored_objective
    from analysis.replay.gradients.plot import describe_ranks
    from analysis.replay.sweeps.sweep_plan import check_before_loading
    from analysis.report import replayed

    console = console or Console()
    folder = output_folder(output or Path("replays") / f"{config_path.stem}")
    store = flexcache.open(store_path)
    recorded = next(iter(store.ledger), None)
    threads = config.threads or (recorded.fingerprint.get("threads") if recorded else 0)
    if threads:  # the bits of bfloat16 results depend on the number of threads
        torch.set_num_threads(int(threads))
    asked = config.attribution
    objective = None if asked is None else asked.objective
    texts = _has_text(config.answers) or (objective is not None and _has_text(objective.logit_difference))
    tokenizer = config.model.tokenizer() if texts else None
    answers = read_answers(config.answers, tokenizer)
    depth = max((array.depth or 0 for array in store.arrays.values()), default=0)
    edits = [make_edit(store, config, depth, given, str(config_path)) for given in config.edits]
    names = config.documents
    if isinstance(names, int):
        names = judged_documents(edits, map(str, store.documents["id"].to_pylist()))[:names]
    grid, given_answers = config.at.grid(), config.answers is not None
    readout = [config.readout] if isinstance(config.readout, int) else config.readout
    check_before_loading(store, grid, config.metrics, config.baselines, given_answers, names, readout, depth)
    model = config.model.load()
    target = None
    if asked is not None:
        given = donors(store, asked.donors)
        named: dict[str, Any] = {"method": asked.method, "layers": asked.layers, "steps": asked.steps}
        check_attribution(store, given, config.at.site, model=model, **named)
        target = None if objective is None else objective.load(tokenizer)
        stored_objective(store, target)
    direct = None
    if config.logit_attribution is not None:
        direct = logit_attribution.compute(
            store, model, answers, documents=names, **config.logit_attribution.model_dump()
        )
    sweep = replay.sweep(
        store,
        config.model.load if config.scheduler else model,
        grid,
        edits,
        config.metrics,
        config.baselines,
        answers=answers,
        documents=names,
        readout=readout,
        copies=config.copies,
        seed=config.seed,
        accept=config.accept,
        folder=folder,
        scheduler=config.scheduler,
        workers=config.workers,
        progress=progress,
    )
    exact = None
    if asked is not None:
        shared: dict[str, Any] = {"objective": target, "accept": config.accept}
        found = replay.attribution(store, given, config.at.site, model=model, **named, **shared)
        exact = replay.verify(store, model, found, asked.top, sample=asked.sample, seed=config.seed, **shared)
    console.print(sweep.table())
    error = float(sweep.results["identity_error"].max())
    console.print(
        f"identity error: {error:.3g} at most (logits of a replay without edits minus those of the forward pass)"
    )
    if direct is not None:
        console.print(contributions.table(direct))
    if exact is not None:
        console.print(describe_ranks(exact), markup=False, highlight=False)
    for split in sweep.results.attrs["splits"]:
        console.print(split, markup=False, highlight=False)
    for note in sweep.results.attrs["notes"]:
        console.print(note, style="yellow", markup=False)
    command = shlex.join(["flexcache", "replay", shown(store.path), str(config_path), "--output", shown(folder)])

    def write(place: Path) -> Path:
        for metric in sweep.metrics:
            sweep.plot(place / f"{metric}.png", metric)
        if direct is not None:
            contributions.heat_map(direct, place / "logit_attribution.png")
            saved.save({"logit_attribution": direct}, place / "logit_attribution.zarr", saved.identity(store))
        parts = {"exact": exact, "direct": direct}
        return replayed.write(store, sweep, place / "report.html", **parts, command=command, groups=config.groups)

    page = write_or_rescue(write, folder)
    for what, path in (("report", page), ("pictures", folder), ("numbers", folder / "results.zarr")):
        console.print(f"{what:<8} {shown(path)}", markup=False, highlight=False, soft_wrap=True)
    return page


def _has_text(answers: object) -> bool:
    if isinstance(answers, dict):
        return any(_has_text(pair) for pair in answers.values())
    return isinstance(answers, list | tuple) and any(isinstance(token, str) for token in answers)
