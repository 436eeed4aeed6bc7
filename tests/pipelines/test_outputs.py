"""Outputs of commands: checked before the work, rescued after it, and printed on ASCII terminals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flexcache
from analysis import probes
from flexcache.errors import ConfigError
from pipelines import cli
from tests.models import tiny
from tests.pipelines.test_cli import run

DOCS = [{"id": str(i), "tokens": [5 + i, 6, 7 + i], "label": "ab"[i % 2]} for i in range(12)]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "run.zarr"
    flexcache.capture(tiny("llama"), None, DOCS, path, layers=[0, 1], progress=False)
    return path


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


IN_THE_WAY: dict[str, Callable[[Path], Any]] = {
    "taken": lambda path: path.write_text("x"),
    "dangling": dangling,
    "taken/below": lambda path: path.parent.write_text("x"),
    "n" * 300: lambda path: None,
    "-": lambda path: None,
    "/proc/results": lambda path: None,
}
FOLDERS = {
    "probe": ["STORE", "--target", "label", "--cv", "3", "-q", "-o"],
    "stats": ["STORE", "--only", "moments", "-q", "-o"],
    "report": ["STORE", "-q", "--stats"],
    "replay": ["STORE", "replay.yaml", "-q", "-o"],
    "export": ["STORE", "--to", "npy", "-q"],
    "demo": ["-o"],
}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_cannot_be_written_fails_before_the_work(
    command: str, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "replay.yaml").write_text("model: nowhere\nedits: [{zero: {}}]\n")
    monkeypatch.setattr(probes, "sweeps", pytest.fail)
    for place, make in IN_THE_WAY.items():
        make(tmp_path / place)
        before = sorted(os.listdir(tmp_path))
        given = [str(captured) if part == "STORE" else part for part in FOLDERS[command]]
        # `-- -` is how click takes a lone dash as a path
        said = run(capsys, command, *given, *(["--", place] if command == "export" else [place]), status=2)
        assert re.search("cannot be written there|a path cannot be used", said), (place, said)
        assert sorted(os.listdir(tmp_path)) == before
        for made in (tmp_path / place, tmp_path / "taken"):
            if len(place) < 255 and (made.is_symlink() or made.is_file()):
                made.unlink()


@pytest.mark.parametrize("command", ["report", "bench-codec"])
def test_a_file_that_cannot_be_written_fails_before_the_work(
    command: str, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("x")
    for place in (".", "taken/page", "/dev/full", "-", "n" * 300, "/proc/page"):
        said = run(capsys, command, str(captured), "-q", "-o", place, status=2)
        assert re.search("cannot be written there|a path cannot be used", said), (place, said)
        assert os.listdir(tmp_path) == ["taken"]


def test_statistics_do_not_replace_a_folder_of_other_files(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.survey.read", pytest.fail)
    (tmp_path / "stats" / "resid_post.stats.zarr").mkdir(parents=True)
    assert "something else" in run(capsys, "stats", str(captured), "--only", "moments", "-q", status=1)


def test_results_that_the_disk_refuses_are_written_to_a_temporary_folder(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = probes.Sweep.save

    def full(sweep: probes.Sweep, folder: Path) -> Path:
        if tmp_path in Path(folder).parents:
            raise OSError(28, "No space left on device", str(folder))
        return saved(sweep, folder)

    monkeypatch.setattr(probes.Sweep, "save", full)
    said = run(capsys, "probe", str(captured), "--target", "label", "--cv", "3", "-q", "-o", "out", status=1)
    found = re.search(r"they are in (\S+):", said)
    assert "No space left on device" in said
    assert found is not None
    assert probes.load(found[1]).results["score"].size
    assert (Path(found[1]) / "report.html").is_file()


def test_a_tilde_means_the_home_folder_in_commands_and_configurations(
    config: Path, captured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = config.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    written = config.read_text()
    model, texts = re.findall(r"(?:model|documents): (.*)", written)
    (home / "model").symlink_to(model)
    (home / "texts.jsonl").symlink_to(texts)
    (home / "run.yaml").write_text(
        written.replace(model, "~/model").replace(texts, "~/texts.jsonl").replace("run.zarr", "~/run.zarr")
    )
    run(capsys, "capture", "~/run.yaml", "-q")
    run(capsys, "probe", "~/run.zarr", "--target", "label", "--cv", "3", "--layers", "0,1", "-q", "-o", "~/probes")
    run(capsys, "stats", "~/run.zarr", "--only", "moments", "-q", "-o", "~/stats")
    run(capsys, "export", "~/run.zarr", "~/npy", "--to", "npy", "--sites", "resid_post", "--layers", "0, 1", "-q")
    run(capsys, "copy", "~/run.zarr", "~/copy.zarr", "--sites", "resid_post", "-q")
    run(capsys, "verify", "~/copy.zarr", "-q")
    assert {path.name for path in home.iterdir()} >= {"run.zarr", "probes", "stats", "npy", "copy.zarr"}
    assert not (config.parent / "~").exists()


def test_an_adapter_whose_base_cannot_be_loaded_is_named_in_the_error(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    for command in (["capture", str(config), "-q", "--set", "model=adapter"], ["sites", "adapter"]):
        said_of = run(capsys, *command, status=2)
        assert "is a PEFT adapter of base model gpt2" in said_of
        assert "name another base: model: {name: FOLDER, adapter: adapter}" in said_of
    with pytest.raises(ConfigError, match="PEFT adapter"):
        flexcache.ModelSource(name="adapter").tokenizer()


def test_a_store_that_cannot_be_made_fails_before_the_model_is_loaded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flexcache.ModelSource, "load", pytest.fail)
    (tmp_path / "taken").write_text("x")
    for place in ("taken", "taken/run.zarr", "/proc/run.zarr", "n" * 250):
        assert run(capsys, "capture", str(config), "-q", "--set", f"store={place}", status=1).count("\n") < 8


SCRIPT = """
import sys
from pipelines.cli import main
store, *lines = sys.argv[1:]
for line in lines:
    try:
        main(line.replace("STORE", store).split())
    except SystemExit as end:
        print("status", end.code)
"""


def test_commands_print_on_an_ascii_terminal(captured: Path, tmp_path: Path) -> None:
    lines = [
        "info STORE",
        "verify STORE",
        "probe STORE --target label --cv 3 -o probes",
        "stats STORE --only moments,quantiles,outliers -o stats",
        "bench-codec STORE --layers 0",
        "export STORE npy --to npy",
        "--help",
        "info no–store",
    ]
    root = str(Path(cli.__file__).parents[1])
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(captured), *lines],
        cwd=tmp_path, env={**os.environ, **ascii_only, "PYTHONPATH": root}, capture_output=True, timeout=300,
    )  # fmt: skip
    out, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert out.count("status 0") == len(lines) - 1, out + errors
    assert "Traceback" not in errors
    assert "status 1" in out


def test_a_full_or_closed_output_causes_no_traceback(captured: Path) -> None:
    root = str(Path(cli.__file__).parents[1])
    command = [sys.executable, "-m", "pipelines", "info", str(captured)]
    env = {**os.environ, "PYTHONPATH": root}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("No space left on device")
    assert "Traceback" not in done.stderr
