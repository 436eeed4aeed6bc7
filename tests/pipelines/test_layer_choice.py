"""Layers are chosen in the same words by every command that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flexcache
from analysis import probes, survey
from tests.analysis.stores import value_store
from tests.pipelines.test_cli import run


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> flexcache.Store:
    """Return a store of four layers in the working folder."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).normal(size=(4, 60, 6))
    return value_store(tmp_path / "run.zarr", values, [3] * 20, labels={"label": [i % 2 for i in range(20)]})


@pytest.mark.usefixtures("stored")
def test_every_command_takes_layers_as_numbers_with_commas(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = "--layers=1,3"
    run(capsys, "copy", "run.zarr", "copied.zarr", chosen, "-q")
    assert flexcache.open("copied.zarr").layers("resid_post") == (1, 3)
    run(capsys, "preshuffle", "run.zarr", "shuffled.zarr", chosen, "-q")
    assert flexcache.open("shuffled.zarr").layers("resid_post") == (1, 3)
    run(capsys, "export", "run.zarr", "files", "--to", "npy", chosen, "-q")
    assert {path.name for path in Path("files").glob("resid_post*")} == {f"resid_post.layer_{n}.npy" for n in (1, 3)}
    run(capsys, "stats", "run.zarr", "--only", "moments", chosen, "-q")
    assert survey.load("stats", "resid_post")["total"]["layer"].values.tolist() == [1, 3]
    run(capsys, "bench-codec", "run.zarr", chosen, "-o", "codecs.json", "-q")
    assert {loss["layer"] for loss in json.loads(Path("codecs.json").read_text())[0]["losses"]} == {1, 3}
    run(capsys, "probe", "run.zarr", "--target", "label", "--cv", "3", "--probe", "ridge", chosen, "-o", "out", "-q")
    assert probes.load("out").layers == (1, 3)
    run(capsys, "probe", "transfer", "out", "run.zarr", chosen)
    assert json.loads(Path("out/transfer.json").read_text())["coords"]["layer"]["data"] == [1, 3]
    run(capsys, "probe", "compare", "out", chosen)
    assert json.loads(Path("out/compare.json").read_text())["coords"]["first"]["data"] == ["layer 1"]
    run(capsys, "rm", "run.zarr", "--site", "resid_post", chosen, "--yes")
    assert flexcache.open("run.zarr").layers("resid_post") == (0, 2)
