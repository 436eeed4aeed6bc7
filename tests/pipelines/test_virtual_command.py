"""Thin, fill and the estimate of virtual layers, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flexcache
from tests.pipelines.test_cli import run


def test_a_store_is_thinned_and_filled_from_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    full = flexcache.open("run.zarr")
    rows = {layer: full.read("resid_post", layer) for layer in full.layers("resid_post")}
    estimated = json.loads(
        run(capsys, "estimate", config, "-q", "--json", "--tokens-per-second", 1000, "--keep", "every:2")
    )
    text = run(capsys, "thin", "run.zarr", "--keep", "every:2", "--config", config, "-q", "--yes")
    store = flexcache.open("run.zarr")
    kept = tuple(layer for layer in rows if layer % 2)
    assert store.layers("resid_post") == kept
    assert "virtual" in text
    shards = [path for path in Path("run.zarr/resid_post/c").rglob("*") if path.is_file()]
    assert estimated["plan"]["files"] == len(shards)
    assert estimated["bytes"]["shards"] == sum(path.stat().st_size for path in shards)
    blocks = {int(layer): held["blocks"] for layer, held in estimated["virtual"]["resid_post"].items()}
    assert blocks == {layer: 1 for layer in rows if layer not in kept}, "one block after a layer on disk, or the tokens"
    seconds = estimated["virtual"]["resid_post"]["0"]["seconds"]
    assert seconds == pytest.approx(1e6 / 1000 / full.arrays["resid_post"].depth)

    run(capsys, "fill", "run.zarr", "--layers", "0", "--config", config, "-q", "--yes")
    store = flexcache.open("run.zarr")
    assert store.layers("resid_post") == (0, *kept)
    for layer in store.layers("resid_post"):
        assert np.array_equal(store.read("resid_post", layer), rows[layer])
    assert "every checksum agrees" in run(capsys, "verify", "run.zarr", "-q")
    text = run(capsys, "estimate", config, "-q", "--tokens-per-second", 1000, "--keep", "every:2")
    assert "reading them" in text


@pytest.mark.filterwarnings("default")
def test_virtual_layers_that_are_left_out_are_a_note_without_the_place_in_the_code(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "capture", config, "-q", "--set", "keep=every:2")
    text = run(capsys, "stats", "run.zarr", "-q")
    assert "note: layers 0, 2 of resid_post are virtual" in text
    assert "UserWarning" not in text
    assert ".py" not in text


def test_thin_says_what_it_needs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    assert "--keep every:6" in run(capsys, "thin", "run.zarr", "--yes", status=2)
    assert "given twice" in run(
        capsys, "thin", "run.zarr", "--keep", "every:2", "--config", config, "--model", "x", "--yes", status=2
    )
    assert "on disk" in run(capsys, "fill", "run.zarr", "--yes", status=1)
