from __future__ import annotations

import shlex
from typing import Any

import pytest
from rich.console import Console

from analysis import probes
from flexcache.errors import AnalysisError, ConfigError
from pipelines import probe

EVIL = r"<script>alert('label & co')</script> $\q$"


def test_the_command_writes_numbers_plot_and_report_and_prints_their_paths(real_store: Any, tmp_path: Any) -> None:
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


def test_several_probes_get_a_folder_each_and_transfer_to_another_store(real_store: Any, tmp_path: Any) -> None:
    from pipelines.cli import main

    out = str(tmp_path / "probes")
    asked = ["probe", str(real_store.path), "--target", EVIL, "--probe", "ridge,mass-mean", "-o", out, "--quiet"]
    main_exits(main, asked)
    folders = sorted(path.name for path in (tmp_path / "probes").iterdir())
    assert [name.rsplit("-", 1)[-1] for name in folders] == ["mean", "ridge"]
    assert all((tmp_path / "probes" / name / "weights.safetensors").is_file() for name in folders)
    main_exits(main, ["probe", "transfer", str(tmp_path / "probes" / folders[1]), str(real_store.path)])
    saved = (tmp_path / "probes" / folders[1] / "transfer.json").read_text()
    assert '"accuracy"' in saved
    with pytest.raises(AnalysisError, match="holds several sweeps"):
        probe.run_transfer(out, real_store.path)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["x.zarr"], "without --target"), (["transfer", "x"], "probe transfer x"), (["a", "b"], "a b")],
)
def test_a_probe_command_with_missing_arguments_explains_its_usage(words: list[str], message: str, capsys: Any) -> None:
    from pipelines.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["probe", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "flexcache probe STORE --target COLUMN" in said


def main_exits(main: Any, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
