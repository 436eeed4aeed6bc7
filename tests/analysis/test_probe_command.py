from __future__ import annotations

import shlex
from typing import Any

import pytest
from rich.console import Console

from analysis import probes
from flexcache.errors import ConfigError
from pipelines import probe

EVIL = r"<script>alert('label & co')</script> $\q$"


def test_the_command_writes_numbers_plot_and_report_and_says_where(real_store: Any, tmp_path: Any) -> None:
    with open(tmp_path / "out.txt", "w") as file:
        console = Console(file=file, width=120)
        sweep = probe.run(
            real_store.path,
            EVIL,
            "resid_post",
            "ridge",
            rows="mean",
            layers="0:1",
            output=tmp_path / "x",
            console=console,
        )
    said = (tmp_path / "out.txt").read_text()
    for name in ("sweep.json", "plot.png", "report.html"):
        assert (tmp_path / "x" / name).stat().st_size > 0
        assert str(tmp_path / "x" / name) in said
    assert probes.load(tmp_path / "x").results.identical(sweep.results)
    assert "majority" in said
    assert sweep.results["layer"].values.tolist() == [0]


def test_a_misspelt_probe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean logistic"):
        probe.run("nowhere.zarr", "label", "resid_post", "logisitc")


def test_the_command_line_in_the_report_is_quoted(real_store: Any, tmp_path: Any) -> None:
    from html import unescape

    probe.run(real_store.path, EVIL, "resid_post", output=tmp_path, console=Console(quiet=True))
    text = unescape((tmp_path / "report.html").read_text("utf-8"))
    line = next(line for line in text.splitlines() if "flexcache probe" in line)
    words = shlex.split(line.removeprefix("<pre><code>").removesuffix("</code></pre>"))
    assert words[:6] == ["flexcache", "probe", str(real_store.path), "--target", EVIL, "--site"]
