"""flexcache probe: train probes on a store and write tables, files and reports; score saved probes on another store."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from sklearn.base import BaseEstimator, clone

import flexcache
from analysis import probes, report
from analysis.dataset import targets
from analysis.probes import Sweep, SweepOptions
from analysis.probes.results import FILE
from analysis.probes.table import NAMES, interval, number
from analysis.report.facts import describe_dropped
from analysis.rescue import write_or_rescue
from analysis.terminal_table import TerminalTable
from flexcache.errors import AnalysisError, ConfigError, nearest
from flexcache.paths import local_path, output_folder, shown
from flexcache.site import Layers, resolve_layers

if TYPE_CHECKING:
    import xarray as xr

PROBES: dict[str, BaseEstimator] = {
    "logistic": probes.Logistic(Cs=5),
    "ridge": probes.Ridge(alphas=6),
    "mass-mean": probes.MassMean(),
    "nearest-centroid": probes.NearestCentroid(),
    "lda": probes.LDA(shrinkages=4),
    "inlp": probes.INLP(),
    "mlp": probes.MLP(),
    "attention": probes.AttentionPooled(),
}


def run(
    store_path: str | Path | flexcache.Store,
    target: str | Sequence[str],
    site: str | Sequence[str],
    probe: str | Sequence[str] | None = None,
    *,
    class_weight: str | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> Sweep:
    """Probe a store, print tables, and write ``sweep.json``, weights, pictures and ``report.html``.

    Parameters
    ----------
    store_path
        The folder of a store; or an open store, with an attached model.
    target, site
        See `analysis.probes.sweep`; a target is read by `analysis.targets.read`.
    probe
        Names of `PROBES`; those with strengths choose among several. Logistic for classes and ridge for numbers by
        default.
    class_weight
        Weight of the classes in the loss, for probes that have it: ``"balanced"``.
    output
        The folder of the results; ``probes/<site>-<target>`` in the working folder by default. With several targets,
        sites or probes, each has a subfolder.
    options
        Fields of `analysis.probes.SweepOptions`; groups may also be ``"none"``.

    Returns
    -------
    Sweep
        The first sweep.

    Raises
    ------
    ConfigError
        There is no such probe, or it takes no class weight.
    AnalysisError, StoreError
        See `analysis.probes.sweep` and `flexcache.open`.
    """
    asked, sites, kinds = (([x] if isinstance(x, str) else list(x or ())) for x in (target, site, probe))
    for name in kinds:
        if name not in PROBES:
            raise ConfigError(f"there is no probe {name!r}", remedy=nearest(name, tuple(PROBES)))
    console = console or Console()
    if options.get("groups") == "none":
        options["groups"] = None
    chosen = probes.SweepOptions.merge(None, options, run)
    several = len(asked) * len(sites) * max(1, len(kinds)) > 1
    folder = output_folder(output or ("probes" if several else f"probes/{_safe(f'{sites[0]}-{asked[0]}')}"))
    store = store_path if isinstance(store_path, flexcache.Store) else flexcache.open(store_path)
    found = probes.sweeps(
        store,
        [one for text in asked for one in targets.read(store, text)],
        sites,
        {name: _weighted_probe(name, class_weight) for name in kinds or (["logistic"] if class_weight else [])} or None,
        options=chosen,
    )
    several = len(found) > 1
    commands = {}
    for key in found:
        what, where, kind = key
        command = ["flexcache", "probe", shown(store.path), "--target", what, "--site", where]
        command += ["--probe", kind] if kinds else []
        command += ["--class-weight", class_weight] if class_weight else []
        commands[key] = shlex.join(command + _given_options(chosen))
    if output is None and several:
        folder = output_folder("probes")
    for sweep in found.values():
        console.print(sweep.table())
        facts = sweep.results.attrs
        said = f"{facts['target']} is a {facts['task']}: {facts['task_reason']}"
        console.print(said + describe_dropped(facts.get("dropped", {})), markup=False, highlight=False, soft_wrap=True)

    def write(place: Path) -> list[tuple[str, Path]]:
        files = []
        for key, sweep in found.items():
            into = place / _safe("{1}-{0}-{2}".format(*key)) if several else place
            files += _write(store, sweep, into, commands[key])
        return files

    console.print()
    for what, path in write_or_rescue(write, folder):
        console.print(f"{what:<8} {shown(path)}", markup=False, highlight=False, soft_wrap=True)
    return next(iter(found.values()))


def run_transfer(
    folder: str | Path,
    store_path: str | Path,
    target: str | None = None,
    classes: Mapping[str, str] | None = None,
    *,
    output: str | Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> xr.Dataset:
    """Score saved probes on another store; print a table and write ``transfer.json`` to *output*.

    *output* is the folder of the probes by default; *options* are groups, rows, layers, seed and other_model, as in
    `analysis.probes.transfer`.

    Raises
    ------
    AnalysisError
        *folder* holds no saved sweep, or several; see also `analysis.probes.transfer`.
    """
    console = console or Console()
    place = local_path(folder)
    into = place if output is None else output_folder(output)
    sweep, store = _load_one(place), flexcache.open(store_path)
    if options.get("groups") == "none":
        options["groups"] = None
    found = probes.transfer(sweep, store, target, classes=classes, **options)
    best = sweep.best.layer
    table = TerminalTable(
        title=f"{sweep.results.attrs['target']} probes of {place.name}, tried on {found.attrs['samples']:,} samples of "
        f"{store.path.name} for {found.attrs['target']}{describe_dropped(found.attrs['dropped'])}",
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    measured = [str(metric) for metric in found["metric"].values[:2]]
    for metric in measured:
        table.add_column(Text(f"{NAMES[metric]}\n[95 % over groups]"), justify="right")
    for layer in found["layer"].values.tolist():
        cells = []
        for metric in measured:
            score, low, high = (
                float(found[name].sel(layer=layer, metric=metric)) for name in ("score", "ci_low", "ci_high")
            )
            cells.append(f"{number(score)} {interval(low, high)}")
        table.add_row("–" if layer < 0 else str(layer), *cells, style="bold" if layer in (best, -1) else None)
    console.print(table)
    told = found.attrs
    if renamed := [f"{one} as {other}" for one, other in told["classes"].items() if one != other]:
        console.print(f"Classes: {', '.join(renamed)}.", markup=False, highlight=False)
    if told["left_out"]:
        left_out = ", ".join(f"{count:,} of {name}" for name, count in told["left_out"].items())
        console.print(f"Left out, for lack of such a class: {left_out}.", markup=False, highlight=False)
    if best is not None:
        console.print(f"In bold: the layer that was best on {sweep.results.attrs['target']} itself.", highlight=False)

    _write_numbers(found, into, "transfer.json", console)
    return found


def run_compare(
    folders: Sequence[str | Path],
    layers: Layers = "all",
    metric: str | None = None,
    *,
    output: str | Path | None = None,
    console: Console | None = None,
) -> xr.Dataset:
    """Compare saved probes on the folds that they share; print a table and write ``compare.json`` to *output*.

    Of one folder, *layers* are compared with each other; of several, their best layers, or the given ones of each.
    *output* is the first folder by default.

    Raises
    ------
    AnalysisError
        A folder holds no saved sweep, or several; see also `analysis.probes.compare`.
    """
    console = console or Console()
    places = [local_path(folder) for folder in folders]
    into = places[0] if output is None else output_folder(output)
    asked: dict[str, Sweep | tuple[Sweep, int]] = {}
    for place in places:
        sweep = _load_one(place)
        if layers == "all" and len(places) > 1:
            asked[shown(place)] = sweep
            continue
        chosen = sweep.layers if layers == "all" else resolve_layers(layers, max(sweep.layers) + 1)
        start = f"{shown(place)}, " if len(places) > 1 else ""
        asked |= {f"{start}layer {layer}": (sweep, layer) for layer in chosen}
    found = probes.compare(asked, metric=metric)
    told = found.attrs
    table = TerminalTable(
        title=f"{NAMES[told['metric']]} for {told['target']}, paired over {told['groups']:,} groups",
        caption=Text(" ".join([f"Intervals of 95 %; p after {told['correction']}.", *told["notes"]])),
        title_justify="left",
        caption_justify="left",
    )
    for name in ("first", "second"):
        table.add_column(name, overflow="fold")
    for name in ("difference\non other groups", "p", "and on other\ntraining sets", "p"):
        table.add_column(name, justify="right")
    for number_of in range(found.sizes["pair"]):
        at = found.isel(pair=number_of)
        value = {str(name): float(at[name]) for name in found.data_vars}
        table.add_row(
            Text(f"{at['first'].item()}: {number(value['first_score'])}"),
            Text(f"{at['second'].item()}: {number(value['second_score'])}"),
            Text(f"{number(value['difference'])} {interval(value['ci_low'], value['ci_high'])}"),
            number(value["p_corrected"]),
            Text(interval(value["fold_low"], value["fold_high"])),
            number(value["fold_p_corrected"]),
        )
    console.print(table)
    _write_numbers(found, into, "compare.json", console)
    return found


def _load_one(place: Path) -> Sweep:
    """Load the sweep of a folder; raise AnalysisError if it has subfolders with several."""
    if not (place / FILE).is_file() and (inside := sorted(place.glob(f"*/{FILE}"))):
        raise AnalysisError(
            "the folder holds several sweeps",
            where=str(place),
            found=", ".join(path.parent.name for path in inside[:6]),
            remedy=f"give one of them, such as {inside[0].parent}",
        )
    return probes.load(place)


def _write_numbers(found: xr.Dataset, folder: Path, name: str, console: Console) -> None:
    def write(target: Path) -> Path:
        target.mkdir(parents=True, exist_ok=True)
        probes.save_dataset(found, target / name)
        return target / name

    path = write_or_rescue(write, folder)
    console.print(f"numbers  {shown(path)}", markup=False, highlight=False, soft_wrap=True)


def _given_options(options: SweepOptions) -> list[str]:
    """Return the options of the command line that differ from their defaults, and ``--cv``."""
    words = ["--cv", str(options.cv)]
    for name in ("seed", "groups", "rows", "layers", "task", "metric", "repeats", "nulls"):
        value = getattr(options, name)
        if value != getattr(SweepOptions, name):
            words += [f"--{name}", "none" if value is None else "".join(str(value).split()).strip("[]()")]
    return words


def _weighted_probe(name: str, class_weight: str | None) -> BaseEstimator:
    """Return the probe called *name*, with a weight of the classes."""
    probe = PROBES[name]
    if class_weight is None:
        return probe
    if class_weight != "balanced" or "class_weight" not in probe.get_params():
        takes = [kind for kind, one in PROBES.items() if "class_weight" in one.get_params()]
        raise ConfigError(
            "the class weight cannot be used",
            expected=f"--class-weight balanced, with --probe {' or '.join(takes)}",
            found=f"--class-weight {class_weight}, with --probe {name}",
        )
    return clone(probe).set_params(class_weight=class_weight)


def _write(store: flexcache.Store, sweep: Sweep, folder: Path, command: str) -> list[tuple[str, Path]]:
    """Write the files of a sweep, and return the kind and the path of each."""
    saved = sweep.save(folder)
    sweep.plot(folder / "plot.png")
    files = [("plot", folder / "plot.png"), ("numbers", saved)]
    if "confusion" in sweep.results:
        probes.confusion(sweep, folder / "confusion.png")
        files.append(("classes", folder / "confusion.png"))
    if "confidence" in sweep.results:
        probes.calibration(sweep, folder / "calibration.png")
        files.append(("chances", folder / "calibration.png"))
    files.insert(0, ("report", report.write(store, sweep, folder / "report.html", command=command)))
    return files


def _safe(name: str) -> str:
    return name.replace("/", "-")
