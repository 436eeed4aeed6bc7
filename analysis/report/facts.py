"""Facts about a store and a sweep for a report, as (name, text) lines."""

from __future__ import annotations

import json
from typing import Any

from analysis import probes
from analysis.dataset.document_columns import AS_REQUESTED
from analysis.probes import Sweep
from flexcache.store.format.text import layer_text, size
from flexcache.store.read.display import sites as site_lines
from flexcache.store.read.display import summary
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation

Lines = list[tuple[str, str]]

ROWS = {
    "last": "the last kept token",
    "first": "the first token",
    "mean": "the mean of its tokens",
    "max": "the largest value of its tokens",
    "tokens": "all tokens together",
    "all": "every token",
}


def captured(store: Store) -> Lines:
    """Return the content of the store, and the speed of the capture if its runs were recorded."""
    lines = [(name, text) for name, text in summary(store).items() if name != "units"]
    for name, layers, shape, dtype in site_lines(store):
        lines.append((name, f"{shape}, {dtype}" + ("" if layers == "–" else f", layers {layers}")))
    return lines + _speed(store)


def asked(sweep: Sweep) -> Lines:
    """Return the settings of the sweep."""
    what = sweep.results.attrs
    layers = tuple(int(layer) for layer in sweep.results["layer"].values)
    lines = [
        ("target", str(what["target"])),
        ("task", ": ".join(what[key] for key in ("task", "task_reason") if key in what)),
        ("site", what["site"] + ("" if layers == (-1,) else f", layers {layer_text(layers)}")),
        ("of each document", ROWS.get(what["rows"], f"the token at position {what['rows']}")),
        ("probe", what["probe"]),
        ("documents", f"{what['documents']:,}" + describe_dropped(what["dropped"])),
        ("samples", f"{what['samples']:,} in {what['groups_found']:,} groups"),
    ]
    if what["classes"]:
        sizes = sorted(zip(what["class_samples"], map(str, what["classes"])), reverse=True)
        shown = ", ".join(f"{name} ({count:,})" for count, name in sizes[:8])
        lines.append(("classes", shown + (f", … {len(sizes)} in all" if len(sizes) > 8 else "")))
    lines.append(("memory", f"{size(what['bytes_per_layer'])}: one layer at a time"))
    return lines


def snippet(sweep: Sweep, path: str) -> str:
    """Return Python code that repeats the sweep."""
    what = sweep.results.attrs
    name = what["probe"].split("(")[0]
    ours = name in probes.__all__
    options = {key: what[key] for key in ("cv", "groups", "rows", "seed")}
    options |= {"task": what["task"]} if what.get("task_reason") == AS_REQUESTED else {}
    options |= {key: what[key] for key, usual in (("metric", None), ("repeats", 1)) if what.get(key, usual) != usual}
    layers = [int(layer) for layer in sweep.results["layer"].values]
    if layers != [-1]:
        whole = layers == list(range(layers[0], layers[-1] + 1))
        options["layers"] = f"{layers[0]}:{layers[-1] + 1}" if whole else layers
    text = ",\n    ".join(f"{key}={value!r}" for key, value in options.items())
    return (
        "import flexcache\nfrom analysis import probes\n\n"
        f"store = flexcache.open({path!r})\n"
        "sweep = probes.sweep(\n"
        f"    store, target={what['target']!r}, site={what['site']!r},\n"
        f"    probe={'probes.' if ours else ''}{what['probe']},\n    {text},\n)\n"
        "sweep.best"
    )


def describe_dropped(dropped: dict[str, int]) -> str:
    """Return the number of documents or tokens that were left out for each reason, as the rest of a sentence.

    >>> describe_dropped({"no target": 3})
    '; 3 left out (no target)'
    """
    return "".join(f"; {count:,} left out ({reason})" for reason, count in dropped.items())


def _speed(store: Store) -> Lines:
    tokens = seconds = 0.0
    logs: list[StoreLocation] = [*(store.path / "runs").glob("*.json")]
    for path in sorted(logs, key=str):
        try:
            run: dict[str, Any] = json.loads(path.read_text("utf-8"))
            tokens, seconds = tokens + float(run["tokens"]), seconds + float(run["seconds"])
        except (OSError, ValueError, KeyError, TypeError):  # the record of a run is optional
            continue
    if not tokens or not seconds:
        return []
    return [("recorded runs", f"{tokens:,.0f} tokens in {seconds:,.1f} s, {tokens / seconds:,.0f} a second")]
