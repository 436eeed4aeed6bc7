"""flexcache report: write an HTML page about a store and its statistics."""

from __future__ import annotations

import shlex
import webbrowser
from pathlib import Path

from rich.console import Console

import flexcache
from analysis.dataset import tokens
from analysis.report import store_page
from analysis.rescue import write_or_rescue
from analysis.survey import PARTS, load_existing, results_path
from flexcache.errors import AnalysisError
from flexcache.paths import output_file, output_folder, shown
from pipelines import stats


def run(
    store_path: str | Path,
    site: str = "resid_post",
    *,
    model: str | None = None,
    statistics: str | Path | None = None,
    output: str | Path | None = None,
    show: bool = False,
    scheduler: str = "threads",
    workers: int | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> Path:
    """Write the page from the results in the folder of statistics, whatever they are; compute them if there are none.

    Parameters
    ----------
    statistics
        Folder of the statistics; ``stats`` in the working folder by default.
    output
        The page; ``SITE.html`` in the folder of the statistics by default.
    show
        Open the page in the browser.

    Other parameters, and errors, are those of `pipelines.stats.run`.
    """
    console, folder = console or Console(), output_folder("stats" if statistics is None else statistics)
    output = output_file(folder / f"{site}.html" if output is None else output)
    store = flexcache.open(store_path)
    found = load_existing(store, folder, site, model) or stats.run(
        store_path,
        site,
        model=model,
        scheduler=scheduler,
        workers=workers,
        output=folder,
        console=Console(quiet=True),
        progress=progress,
    )
    try:
        words = tokens.vocabulary(store, model)
    except AnalysisError:
        if (store.provenance.tokenizer or {}).get("class"):
            raise
        words = None  # the documents were token ids, and the model may have no tokenizer
    command = ["flexcache", "report", shown(store.path), *(["--site", site] if site != "resid_post" else [])]
    told = shlex.join([*command, *(["--model", model] if model else [])])
    page = write_or_rescue(
        lambda place: store_page.write(store, found, place / output.name, words=words, command=told), output.parent
    )
    console.print(f"report   {shown(page)}", markup=False, highlight=False, soft_wrap=True)
    absent = [name for name in PARTS if name not in found]
    if found.reused:
        kept = f"reused {shown(results_path(folder, site))}"
        hint = f"{kept}; not in it: {', '.join(absent)} (flexcache stats computes them)" if absent else kept
        console.print(hint, style="dim", markup=False, highlight=False, soft_wrap=True)
    if words is None:
        gone = "tokens are numbers" + ("" if "lens" in found else ", and there is no logit lens")
        hint = f"{gone}: --model FOLDER, the checkpoint with its tokenizer, gives them"
        console.print(hint, style="dim", markup=False, highlight=False, soft_wrap=True)
    if show:
        webbrowser.open(page.absolute().as_uri())
    return page
