from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import flexcache
from pipelines.cli import main
from tests import processes
from tests.recording.test_recorder import shard_hashes


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """Run a command in this process; return what it printed."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert (ended.value.code or 0) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_plan_prints_the_cost_and_writes_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "plan", config)
    for part in ("4 of 4 layers", "documents", "80", "rows", "bytes", "free disk", "run ÷ kept"):
        assert part in text
    assert not Path("run.zarr").exists()


def test_a_plan_that_cannot_fit_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr("flexcache.store.write.create.shutil.disk_usage", lambda path: usage._replace(free=10))
    for command in ("plan", "capture"):
        assert "does not fit on the disk" in run(capsys, command, config, "-q", status=1)
    assert not Path("run.zarr").exists()


def test_the_plan_equals_that_of_the_capture(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "plan", config)
    run(capsys, "capture", config, "-q")
    plan = flexcache.open("run.zarr").plan
    assert f"{plan['rows']:,}" in text
    assert f"{plan['files']:,}" in text


def test_capture_info_verify_from_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "capture", config)
    assert "where the time went" in text
    assert "resid_post" in text
    store = flexcache.open("run.zarr")
    assert store.complete
    assert store.layers("mlp_post") == (0, 3)
    assert store.provenance.model["name"] == "tiny-llama"
    assert len(store.provenance.model["files"]["model.safetensors"]) == 32
    assert store.provenance.documents["files"][0]["name"] == "texts.jsonl"

    text = run(capsys, "info", "run.zarr")
    for part in ("tiny-llama", "complete", "label", "resid_post", "versions", "finished"):
        assert part in text
    assert "options" in text
    assert "xxh3" not in text.partition("made with")[2]
    assert "every checksum agrees" in run(capsys, "verify", "run.zarr")
    assert "nothing to do" in run(capsys, "capture", config)


@pytest.mark.parametrize("native", [False, True])
def test_slow_bfloat16_is_reported(
    config: Path, native: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexcache.recording.run.forward_loop.has_native_bfloat16", lambda: native)
    assert "no instructions for bfloat16" not in run(capsys, "capture", config)  # a model in float32
    half = yaml.safe_load(config.read_text())
    half |= {"model": {"name": half["model"], "dtype": "bfloat16"}, "store": "half.zarr"}
    Path("half.yaml").write_text(yaml.safe_dump(half))
    assert ("no instructions for bfloat16" in run(capsys, "capture", "half.yaml")) == (not native)


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "remove", "empty", "swap", "table", "coordinate", "record", "metadata", "stranger"],
)
def test_verify_names_the_damaged_files(damage: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q", "--set", "batch_tokens=16")
    shard, other = Path("run.zarr/resid_post/c/1/0/0"), Path("run.zarr/resid_post/c/2/0/0")
    named = "resid_post/c/1/0/0"
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "truncate":
        shard.write_bytes(content[:-7])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "remove":
        shard.unlink()
    elif damage == "swap":
        shard.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        named = {
            "table": "documents.parquet",
            "coordinate": "token_id/c/0",
            "record": "ledger/0/0.json",
            "metadata": "resid_post/zarr.json",
            "stranger": "resid_post/c/1/0/extra",
        }[damage]
        with Path("run.zarr", named).open("ab") as file:
            file.write(b"x")
    text = run(capsys, "verify", "run.zarr", "-q", status=1)
    assert named in text


def test_a_damaged_unit_is_recomputed_after_its_record_is_deleted(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "capture", config, "-q", "--set", "batch_tokens=16")
    shard = Path("run.zarr/resid_post/c/1/0/0")
    whole = shard.read_bytes()
    shard.write_bytes(b"x" + whole[1:])
    assert "flexcache repair" in run(capsys, "verify", "run.zarr", status=1)
    Path("run.zarr/ledger/0/0.json").unlink()
    run(capsys, "capture", config, "-q", "--set", "batch_tokens=16")
    assert shard.read_bytes() == whole
    run(capsys, "verify", "run.zarr")


@pytest.mark.parametrize(
    ("change", "message", "status"),
    [
        ("batch_token=3", "did you mean batch_tokens", 2),
        ("model.dtpye=float32", "did you mean dtype", 2),
        ("rows=lasst", "key 'rows'", 2),
        ("batch_tokens=many", "key 'batch_tokens'", 2),
        ("model.name=/nowhere/at/all", "cannot be loaded", 2),
        ("documents.path=nowhere.jsonl", "nowhere.jsonl", 1),
        ("documents.text=txet", "txet", 1),
        ("sites=resid_pots", "did you mean resid_post", 1),
        ("sites=model.layers.7.mlp", "model.layers.7.mlp", 1),
        ("layers=[9]", "no layer 9", 1),
        ("=3", "cannot be read", 2),
    ],
)
def test_mistakes_end_in_one_message_before_anything_is_written(
    change: str, message: str, status: int, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", change] + (["--set", "sites=resid_post"] if change.startswith("layers") else [])
    text = run(capsys, "capture", config, "-q", *changes, status=status)
    assert message in " ".join(text.split())
    assert text.startswith("error:")
    assert "Traceback" not in text
    assert not Path("run.zarr").exists()


def test_a_configuration_that_is_not_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("model: [")
    assert "is not YAML" in run(capsys, "capture", tmp_path / "a.yaml", status=2)
    (tmp_path / "b.yaml").write_text("- model")
    assert "is not a mapping" in run(capsys, "capture", tmp_path / "b.yaml", status=2)
    assert "cannot be read" in run(capsys, "capture", tmp_path / "c.yaml", status=2)
    (tmp_path / "d.yaml").write_text("store: run.zarr")
    assert "key 'model' is missing" in run(capsys, "plan", tmp_path / "d.yaml", status=2)


def test_another_configuration_on_the_same_store_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    text = run(capsys, "capture", config, "-q", "--set", "rows=last", status=1)
    assert "spec.rows: all in the store, last now" in text


def test_a_folder_that_is_not_a_store_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "verify"):
        assert "is not a store" in " ".join(run(capsys, command, tmp_path / "no.zarr", status=1).split())


def launch(processes: int, *arguments: object) -> str:
    """Run a command under torchrun; return its error stream."""
    root = Path(__file__).parents[2]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "pipelines", *map(str, arguments)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr
    return launched.stderr


@pytest.mark.slow  # tests/distributed captures such models in one launch
@pytest.mark.parametrize(
    ("processes", "sizes"), [(2, "{tensor: 2}"), pytest.param(2, "{fsdp: 2}", marks=pytest.mark.slow)]
)
def test_a_model_on_several_processes_fills_a_store(
    processes: int, sizes: str, config: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model={{name: {checkpoint}, parallel: {sizes}}}"
    launch(processes, "capture", config, "-q", "--set", model)
    run(capsys, "capture", config, "-q", "--set", "store=alone.zarr")
    together, alone = flexcache.open("run.zarr"), flexcache.open("alone.zarr")
    assert together.complete
    assert flexcache.verify(together.path).sound
    for name, array in alone.arrays.items():
        for layer in array.slices:
            assert np.allclose(together.read(name, layer), alone.read(name, layer), atol=1e-5)
    assert together.provenance.model == alone.provenance.model
    assert "does not fit the 1 process of" in run(capsys, "capture", config, "-q", "--set", model, status=2)


@pytest.mark.slow
def test_two_processes_of_torchrun_fill_one_store_with_the_same_bytes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(2, "capture", config)
    run(capsys, "capture", config, "-q", "--set", "store=alone.zarr")
    together, alone = flexcache.open("run.zarr"), flexcache.open("alone.zarr")
    assert together.complete
    assert shard_hashes(together.path) == shard_hashes(alone.path)
    assert flexcache.verify(together.path).sound


def test_probe_from_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run(capsys, "capture", config, "-q")
    text = run(capsys, "probe", "run.zarr", "--target", "label", "--rows", "last", "-o", "out", "--layers", "0:2")
    assert "report.html" in text
    assert Path("out/report.html").exists()
    assert "did you mean label" in run(capsys, "probe", "run.zarr", "--target", "lable", status=1)


def test_the_module_runs_the_same_commands(config: Path, tmp_path: Path) -> None:
    command = ("pipelines", "plan", str(config))
    assert "plan of run.zarr" in processes.run(processes.module, *command, folder=tmp_path, output=tmp_path / "output")


def test_the_configuration_examples_are_valid() -> None:
    from pipelines.config import read_config

    examples = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))
    assert examples
    for path in examples:
        read_config(path)


def test_ledger_records_are_plain_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    record = json.loads(Path("run.zarr/ledger/0/0.json").read_text())
    assert record["fingerprint"]["threads"] == 1
    assert record["batch_tokens"] == 64


FUNCTIONS = """
import torch
import yaml

torch.manual_seed(0)
project = torch.nn.Linear(64, 5)


def entropy(pattern):
    return -(pattern * pattern.clamp_min(1e-9).log()).sum(-1).transpose(1, 2)


def margin(output, batch):
    return output.logits[:, :, 5] - output.logits[:, :, 6]
"""


def test_transforms_and_gradients_from_the_command_line(
    config: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("functions_of_a_user.py").write_text(FUNCTIONS)
    text = config.read_text().replace("  resid_post: all\n  mlp_post: [0, -1]\n", "  resid_post.grad: [1]\n")
    text = text.replace(f"model: {checkpoint}", f"model: {{name: {checkpoint}, attention: eager}}")
    config.write_text(
        text + "transforms:\n"
        "  - {name: projected, site: resid_post, layers: [2], function: functions_of_a_user:project}\n"
        "  - {name: entropy, site: pattern, function: functions_of_a_user:entropy}\n"
        "objective: {logit_difference: [w5, w6]}\n"
    )
    planned = run(capsys, "plan", config)
    assert "projected" in planned
    run(capsys, "capture", config, "-q")
    store = flexcache.open("run.zarr")
    assert set(store.sites) == {"resid_post.grad", "projected", "entropy", "objective"}
    assert store.layers("entropy") == (0, 1, 2, 3)
    assert store.spec.objective["function"].endswith("LogitDifference")
    changed = ("--set", "store=b.zarr", "--set", "objective={function: 'functions_of_a_user:margin'}")
    run(capsys, "capture", config, "-q", *changed)
    assert flexcache.open("b.zarr").spec.objective["function"] == "functions_of_a_user.margin"
    wrong = ("--set", "objective={logit_difference: [w5, nothing at all]}")
    assert "is not one token" in run(capsys, "capture", config, "-q", *wrong, status=2)
    wrong = ("--set", "objective={function: 'functions_of_a_user:margn'}")
    assert "did you mean margin" in run(capsys, "plan", config, "-q", *wrong, status=2)


def test_a_damaged_store_is_repaired_from_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run(capsys, "capture", config, "-q")
    before = shard_hashes(Path("run.zarr"))
    torch.set_num_threads(2)
    again = run(
        capsys, "verify", "run.zarr", "--recompute", 1, "--config", config, "-q"
    )  # in one thread, as the file says
    assert "6 of 6 shards are equal" in again
    assert torch.get_num_threads() == 1
    assert "give --config" in run(capsys, "verify", "run.zarr", "--recompute", 2, status=2)
    assert "nothing is damaged" in run(capsys, "repair", "run.zarr", "-q")
    shard = Path("run.zarr/resid_post/c/2/0/0")
    shard.write_bytes(shard.read_bytes()[:100])
    assert "flexcache repair" in run(capsys, "verify", "run.zarr", "-q", status=1)
    assert "taken back, to be computed again: unit 0" in run(capsys, "repair", "run.zarr", "--config", config, "-q")
    assert shard_hashes(Path("run.zarr")) == before
    assert flexcache.verify("run.zarr").sound
