"""`flexcache probe`: a question to a store, answered with a table, files and a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from sklearn.base import BaseEstimator

import flexcache
from analysis import probes, report
from analysis.probes import Sweep
from flexcache.errors import ConfigError, nearest

if TYPE_CHECKING:
    from analysis.view import Rows
    from flexcache.site import Layers

PROBES: dict[str, type[BaseEstimator]] = {"logistic": probes.Logistic, "ridge": probes.Ridge}


def run(
    store_path: str | Path,
    target: str,
    site: str,
    probe: str = "logistic",
    cv: int = 5,
    groups: str | None = "document",
    rows: Rows | None = None,
    layers: Layers = "all",
    output: str | Path | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Sweep:
    """Probe a store, print the table, and write ``sweep.json``, ``plot.png`` and ``report.html``.

    Parameters
    ----------
    store_path
        The folder of a store.
    target, site, cv, groups, rows, layers, seed
        See `analysis.probes.sweep`; groups may also be ``"none"``.
    probe
        ``logistic`` or ``ridge``, with their default strength.
    output
        The folder of the results; by default ``probes/<site>-<target>`` in the current folder.

    Raises
    ------
    ConfigError
        There is no such probe.
    AnalysisError, StoreError
        See `analysis.probes.sweep` and `flexcache.open`.
    """
    if probe not in PROBES:
        raise ConfigError(f"there is no probe {probe!r}", remedy=nearest(probe, tuple(PROBES)))
    console, groups = console or Console(), None if groups == "none" else groups
    store = flexcache.open(store_path)
    sweep = probes.sweep(
        store, target, site, PROBES[probe](), cv=cv, groups=groups, rows=rows, layers=layers, seed=seed
    )
    folder = Path(output) if output is not None else Path("probes") / f"{site}-{target}".replace("/", "-")
    console.print(sweep.table())
    saved = sweep.save(folder)
    sweep.plot(folder / "plot.png")
    command = ["flexcache", "probe", str(store_path), "--target", target, "--site", site, "--probe", probe]
    command += ["--cv", str(cv)] + (["--seed", str(seed)] if seed else [])
    command += ["--groups", groups or "none"] if groups != "document" else []
    command += ["--rows", str(rows)] if rows else []
    command += ["--layers", str(layers)] if layers != "all" else []
    page = report.write(store, sweep, folder / "report.html", command=shlex.join(command))
    console.print()
    for what, path in (("report", page), ("plot", folder / "plot.png"), ("numbers", saved)):
        console.print(f"{what:<8} {path}", markup=False, highlight=False, soft_wrap=True)
    return sweep
