from __future__ import annotations

import io

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from analysis.replay.sweeps.table import table
from analysis.terminal_table import TerminalTable


def printed(shown: TerminalTable, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    text = file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("width", [40, 60, 80, 240])
def test_numbers_stay_whole_at_any_width(width: int, box: bool) -> None:
    shown = TerminalTable(repeated=1, title="scores of many", **({} if box else {"box": None}))
    names = [f"metric {n}" for n in range(7)]
    for name in ("layer", *names):
        shown.add_column(name, justify="right")
    shown.add_column("what it means", overflow="fold")
    rows = [[f"0.{layer}{n}25 [−0.1234, {n}.5678]" for n in range(7)] for layer in range(3)]
    for layer, row in enumerate(rows):
        shown.add_row(str(layer), *row, "a long sentence that may be wrapped")
    text = printed(shown, width)
    assert all(cell in text for row in rows for cell in row)
    assert all(name in text for name in names)
    assert "…" not in text
    assert text.count("scores of many") == 1
    assert (text.count("layer") > 1) == (width < 240), "further tables repeat the layer"


def test_the_caption_of_a_split_table_takes_the_whole_width() -> None:
    shown = TerminalTable(caption="a caption of more words than the last of the tables is wide")
    for name in ("layer", "first measurement", "second"):
        shown.add_column(name, justify="right")
    shown.add_row("3", "0.875", "0.5")
    assert printed(shown, 34).count("layer") == 2
    assert printed(shown, 34).splitlines()[-2:] == ["a caption of more words than the ", "last of the tables is wide"]
    assert printed(shown, 60).splitlines()[-1] == "a caption of more words than the last of the tables is wide"


def test_the_table_of_a_replay_fits_80_columns() -> None:
    rng = np.random.default_rng(0)
    metrics = ["logit_diff_change", "kl_sum", "recovered", "loss_change_mean"]
    arms = ["edit", "identity", "random_direction", "norm_matched"]
    edits = ["Steer by layer", "Function(function='some.package.with.a.long.name:function')"]
    dims = {"arm": arms, "layer": [3, 17], "position": ["-2", "last"], "edit": edits, "alpha": [-4.0, 0.125]}
    coords = {**dims, "document": [f"d{n}" for n in range(6)], "metric": metrics}
    shape = [len(values) for values in coords.values()]
    results = xr.Dataset(
        {
            "value": (list(coords), rng.standard_normal(shape) * 1e-5),
            "unedited": (("edit", "document", "metric"), np.zeros((2, 6, 4))),
            "noise_floor": (("layer", "metric"), np.zeros((2, 4))),
        },
        coords,
        {"one_sided": ["kl_sum"]},
    )
    text = printed(table(results), 80)
    assert "…" not in text
    means = results["value"].mean("document").sel(arm="edit").values.reshape(-1, 4)
    for value in means.ravel():
        assert f"{value:.4g}" in text
    assert text.count("p adjusted,") == 3
