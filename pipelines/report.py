"""`flexcache report`: one HTML page of a store and its statistics."""

from __future__ import annotations

import shlex
import webbrowser
from pathlib import Path

from rich.console import Console

import flexcache
from analysis import tokens
from analysis.report import store_page
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
    """Write the page; statistics that are not there yet are computed first.

    Parameters
    ----------
    statistics
        Folder of the statistics; by default ``stats`` in the current one.
    output
        The page; by default ``SITE.html`` in the folder of the statistics.
    show
        Open it in the browser.

    Other parameters, and errors, are those of `pipelines.stats.run`.
    """
    console, folder = console or Console(), Path("stats" if statistics is None else statistics)
    found = stats.run(
        store_path,
        site,
        model=model,
        scheduler=scheduler,
        workers=workers,
        output=folder,
        console=Console(quiet=True),
        progress=progress,
    )
    store = flexcache.open(store_path)
    words = tokens.vocabulary(store, model)
    command = ["flexcache", "report", str(store_path), *(["--site", site] if site != "resid_post" else [])]
    page = store_page.write(
        store,
        found,
        output or folder / f"{site}.html",
        words=words,
        command=shlex.join([*command, *(["--model", model] if model else [])]),
    )
    console.print(f"report   {page}", markup=False, highlight=False, soft_wrap=True)
    if words is None:
        hint = "tokens are numbers, and there is no logit lens: --model FOLDER, the checkpoint, gives both"
        console.print(hint, style="dim", markup=False, highlight=False, soft_wrap=True)
    if show:
        webbrowser.open(page.absolute().as_uri())
    return page
