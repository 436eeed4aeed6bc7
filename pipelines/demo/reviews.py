"""flexcache demo: run the main workflow on real input, from download to report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape

from flexcache.cpu import has_native_bfloat16
from flexcache.model import ModelSource
from flexcache.paths import output_folder, shown
from flexcache.store.format.text import size
from flexcache.store.storage.backend import relative_files
from pipelines import capture, probe
from pipelines.config import CaptureConfig, DocumentsSource
from pipelines.demo import assets

SITE = "resid_post"


def run(documents: int, output: Path, console: Console) -> None:
    """Download model and texts, capture every layer, probe every layer for sentiment, and write a report."""
    began, output = time.perf_counter(), output_folder(output)
    console.rule("1 of 3: model and texts", align="left")
    model, texts = assets.smollm2(), assets.vader_sample(documents)

    console.rule("2 of 3: capture", align="left")
    store_path = output / "smollm2.zarr"
    config = CaptureConfig(
        model=ModelSource(name=str(model), dtype="bfloat16" if has_native_bfloat16() else "float32"),
        documents=DocumentsSource(path=str(texts)),
        store=store_path,
        sites={SITE: "all"},
        dtype="bfloat16",
    )
    store = capture.run(config)
    console.print(repr(store), highlight=False, markup=False)
    _leave_named(output, model, texts, config)

    console.rule("3 of 3: probe every layer", align="left")
    folder = output / "probes"
    probe.run(store_path, "label", site=SITE, rows="last", output=folder)

    seconds = time.perf_counter() - began
    weight = size(sum((store_path / name).stat().st_size for name in relative_files(store_path)))
    console.rule("done", align="left")
    here = {name: shown(output / name) for name in ("probes/report.html", "smollm2.zarr", "smollm2.yaml", "model")}
    console.print(
        escape(
            f"""{seconds:.0f} s in all. Where to look next:
  {here["probes/report.html"]}    the curve, its baselines, and how they were made
  {here["smollm2.zarr"]}    the store, {weight}: flexcache info {here["smollm2.zarr"]}
  {here["smollm2.yaml"]}    its configuration, such as for flexcache extend; {here["model"]} is the model
  python -c 'import flexcache; print(flexcache.open("{here["smollm2.zarr"]}")["{SITE}"])'"""
        ),
        highlight=False,
        soft_wrap=True,
    )


def _leave_named(output: Path, model: Path, texts: Path, config: CaptureConfig) -> None:
    """Link the model and the texts, and write the configuration, under names that the documentation uses.

    The model is a folder of links, with a configuration that states the dtype in which the demo computed.
    """
    folder = output / "model"
    folder.mkdir(exist_ok=True)
    links = {folder / path.name: path for path in model.iterdir() if path.name != "config.json"}
    for link, target in (links | {output / "texts.parquet": texts}).items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    stated = json.loads((model / "config.json").read_bytes()) | {"dtype": config.model.dtype}
    (folder / "config.json").write_text(json.dumps(stated, indent=2), encoding="utf-8")
    settings = config.model_dump(mode="json", exclude_unset=True) | {"store": shown(config.store)}
    (output / "smollm2.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
