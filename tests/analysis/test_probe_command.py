from __future__ import annotations

import json
import shlex
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from analysis import probes
from flexcache.errors import AnalysisError, ConfigError
from pipelines import probe
from pipelines.commands.analyses import SWEEP_OPTIONS
from tests.analysis.stores import value_store

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


def test_transfer_takes_the_classes_layers_and_rows_of_the_command_line(tmp_path: Any, capsys: Any) -> None:
    from pipelines.cli import main

    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=60)
    values = rng.normal(size=(4, 120, 5))
    values[:, :, 1] += 4.0 * np.repeat(kind, 2)
    labels = {"label": [["neg", "pos"][v] for v in kind], "tomato": [["rotten", "fresh"][v] for v in kind]}
    labels["stars"] = [float(v) if i else None for i, v in enumerate(kind * 2 + rng.integers(2, size=60))]
    store = value_store(tmp_path / "run.zarr", values, [2] * 60, labels=labels)
    out = str(tmp_path / "out")
    sweep = ["probe", str(store.path), "--target", "label", "--probe", "ridge", "--layers", "1,3", "-o", out, "-q"]
    main_exits(main, sweep)
    assert "label is a classification: its values are text" in capsys.readouterr().out
    moved = ["probe", "transfer", out, str(store.path), "--target", "tomato"]
    with pytest.raises(SystemExit) as stopped:
        main(moved)
    assert stopped.value.code == 1
    assert "no class in common" in capsys.readouterr().err
    main_exits(main, [*moved, "--classes", "fresh=pos,rotten=neg", "--layers", "3", "--rows", "first"])
    said = capsys.readouterr().out
    assert "fresh as pos, rotten as neg" in said
    found = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert found["coords"]["layer"]["data"] == [3]
    assert found["attrs"]["classes"] == {"fresh": "pos", "rotten": "neg"}
    assert found["data_vars"]["score"]["data"][0][1] > 0.95
    for more, said in ((["--cv", "3"], "does not use --cv"), (["--classes", "fresh"], "NAME=NAME")):
        with pytest.raises(SystemExit) as stopped:
            main([*moved, *more])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_a_task_is_asked_for_and_taken_from_the_command_line(tmp_path: Any, capsys: Any) -> None:
    from pipelines.cli import main

    rng = np.random.default_rng(0)
    stars = [None, *(float(v) for v in rng.integers(3, size=59))]
    store = value_store(tmp_path / "run.zarr", rng.normal(size=(1, 60, 3)), [1] * 60, labels={"stars": stars})
    asked = ["probe", str(store.path), "--target", "stars", "-o", str(tmp_path / "out"), "-q"]
    with pytest.raises(SystemExit) as stopped:
        main(asked)
    assert stopped.value.code == 1
    assert "--task" in capsys.readouterr().err
    for task, metric in (("classification", "accuracy"), ("regression", "r2")):
        main_exits(main, [*asked, "--task", task, "--cv", "3"])
        assert f"stars is a {task}: as requested; 1 left out (no target)" in capsys.readouterr().out
        assert probes.load(tmp_path / "out").metrics[0] == metric
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert f"--task {task}" in page
        assert f"{task}: as requested" in page


def test_saved_probes_and_layers_are_compared_on_the_command_line(tmp_path: Any, capsys: Any) -> None:
    from pipelines.cli import main

    rng = np.random.default_rng(0)
    label = rng.integers(2, size=60)
    values = rng.normal(size=(3, 60, 4)) + np.array([0, 1, 2])[:, None, None] * label[:, None] * np.eye(4)[0]
    store = value_store(tmp_path / "run.zarr", values, [1] * 60, labels={"label": label.tolist()})
    out = tmp_path / "out"
    main_exits(
        main, ["probe", str(store.path), "--target", "label", "--probe", "ridge,mass-mean", "-o", str(out), "-q"]
    )
    first, second = sorted(out.iterdir())
    capsys.readouterr()
    main_exits(main, ["probe", "compare", str(first), str(second)])
    assert "accuracy for label, paired over 60 groups" in capsys.readouterr().out
    found = json.loads((first / "compare.json").read_text())
    expected = probes.compare({"a": probes.load(first), "b": probes.load(second)})
    assert found["data_vars"]["difference"]["data"] == expected["difference"].values.tolist()
    main_exits(main, ["probe", "compare", str(first), "--layers", "0,2", "--metric", "f1", "-o", str(tmp_path / "c")])
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert (found["coords"]["first"]["data"], found["coords"]["second"]["data"]) == (["layer 0"], ["layer 2"])
    assert found["attrs"]["metric"] == "f1"
    main_exits(main, ["probe", "compare", str(first), "-o", str(tmp_path / "d")])
    assert len(json.loads((tmp_path / "d" / "compare.json").read_text())["data_vars"]["p"]["data"]) == 3
    with pytest.raises(SystemExit) as stopped:
        main(["probe", "compare", str(first), "--cv", "3"])
    assert stopped.value.code == 2
    assert "does not use --cv" in capsys.readouterr().err


def test_the_options_of_the_command_have_the_defaults_of_a_sweep() -> None:
    for name, (_, default) in SWEEP_OPTIONS.items():
        assert getattr(probes.SweepOptions(), name) == default


def test_metric_weights_and_repeats_of_the_command_line_reach_the_sweep_and_its_report(tmp_path: Any) -> None:
    from html import unescape

    from pipelines.cli import main

    rng = np.random.default_rng(0)
    label = (np.arange(80) % 4 == 0).astype(int)
    values = rng.normal(size=(2, 80, 3)) + label[:, None]
    store = value_store(tmp_path / "run.zarr", values, [1] * 80, labels={"label": label.tolist()})
    asked = ["probe", str(store.path), "--target", "label", "-o", str(tmp_path / "out"), "--quiet"]
    main_exits(main, [*asked, "--metric", "auroc", "--class-weight", "balanced", "--repeats", "2"])
    found = probes.load(tmp_path / "out")
    assert found.best.metric == "auroc"
    assert "class_weight='balanced'" in found.results.attrs["probe"]
    assert "repeat_low" in found.results
    page = unescape((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert "--class-weight balanced" in page
    assert "--metric auroc --repeats 2" in page
    assert "over 2 × 5 folds" in page
    with pytest.raises(ConfigError, match="class weight cannot be used"):
        probe.run(store.path, "label", "resid_post", "ridge", class_weight="balanced", output=tmp_path / "no")
