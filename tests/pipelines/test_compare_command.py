from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis import comparison, probes
from analysis.comparison import compare_stores
from tests.pipelines.test_cli import run


def test_two_stores_are_compared_from_the_command_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run(capsys, "capture", config, "-q", "--set", "dtype=float32")
    changes = ("dtype=int8", "store=coarse.zarr", "sites={resid_post: [0, 2]}")
    run(capsys, "capture", config, "-q", *(word for change in changes for word in ("--set", change)))
    text = run(
        capsys,
        *("compare", "run.zarr", "coarse.zarr", "--target", "label", "--cv", "2", "--rows", "mean", "--seed", "3"),
        *("--metric", "balanced_accuracy", "--probe", "lda", "--similarity-rows", "300", "-q"),
    )
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for part in (
        "resid_post: run.zarr (a) and coarse.zarr (b)",
        "balanced accuracy for label, 2 folds",
        "Not compared: resid_post, layer 1, 3, only in the first store.",
        "Not compared: mlp_post, only in the first store.",
        "results compare/compare.zarr",
        "picture compare/compare.png",
    ):
        assert part in words
    expected = compare_stores(
        *("run.zarr", "coarse.zarr"),
        target="label",
        probe=probes.LDA(shrinkages=4),
        cv=2,
        rows="mean",
        seed=3,
        metric="balanced_accuracy",
        similarity_rows=300,
        progress=False,
    )["resid_post"]
    saved = comparison.load("compare")["resid_post"]
    assert saved.identical(expected)
    assert f"{float(expected['error'].sel(layer=2)):.3g}" in words
    assert Path("compare/compare.png").stat().st_size > 10_000
    assert np.isfinite(saved["score"]).all()


def test_mistakes_of_a_comparison_end_in_one_message(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    for arguments, message, status in (
        (("--target", "lable"), "did you mean label", 1),
        (("--site", "resid_pots"), "did you mean resid_post", 1),
        (("--probe", "logisitc"), "did you mean logistic", 2),
        (("--scheduler", "thread"), "did you mean threads", 2),
        (("--layers", "77"), "no layer 77", 1),
        (("--cv", "1", "--target", "label"), "at least two folds", 1),
    ):
        text = run(capsys, "compare", "run.zarr", "run.zarr", "-q", *arguments, status=status)
        assert message in " ".join(text.split())
    text = run(capsys, "compare", "run.zarr", "nowhere.zarr", status=1)
    assert "nowhere.zarr" in text
    assert not Path("compare").exists()
