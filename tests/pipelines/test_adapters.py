"""Adapters in configuration files and on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

import flexcache
from tests.adapters import load_with_peft, save_adapter
from tests.pipelines.test_cli import run
from tests.recording.test_recorder import shard_hashes


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        save_adapter(checkpoint, root / name, seed)
    return root


def test_every_command_loads_the_adapter_of_a_configuration(
    config: Path, adapters: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--set", f"model.adapter={adapters / 'a'}")
    run(capsys, "plan", config, *chosen)
    text = run(capsys, "capture", config, "-q", *chosen)
    assert "tiny-llama, with adapter a (" in text
    documents = yaml.safe_load(config.read_text())["documents"]
    sites = {"resid_post": "all", "mlp_post": [0, -1]}
    quiet = {"progress": False, "batch_tokens": 64}
    expected = flexcache.capture(
        load_with_peft(checkpoint, adapters / "a"), str(checkpoint), documents, "python.zarr", sites=sites, **quiet
    )
    assert shard_hashes(Path("run.zarr")) == shard_hashes(expected.path)
    refused = run(capsys, "capture", config, "-q", "--set", f"model.adapter={adapters / 'b'}", status=1)
    assert "adapters: a (" in refused
    assert "before, b (" in refused
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": str(adapters / "a")}))
    assert "every checksum agrees" in run(capsys, "verify", "run.zarr", "--recompute", 1, "--config", config)
    text = run(capsys, "extend", config, "-q", "--set", "sites={mlp_out: [1]}")
    assert "mlp_out" in text


def test_the_tokenizer_of_one_adapter_is_its_own_if_it_has_one(
    config: Path, adapters: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(adapters / "a", own)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, own)
    changed = own / "tokenizer.json"
    changed.write_text(changed.read_text().replace('"w5"', '"other"'))
    source = flexcache.ModelSource(adapter=str(own), name=str(checkpoint))
    assert source.tokenizer().convert_tokens_to_ids("other") == 5
    both = flexcache.ModelSource(adapter=[str(own), str(adapters / "b")], name=str(checkpoint))
    assert both.tokenizer().convert_tokens_to_ids("w5") == 5


def test_the_sites_of_an_adapter_and_its_statistics_need_only_its_folder(
    config: Path, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "lora_A" in run(capsys, "sites", adapters / "a", "--match", "**.lora_A.*")
    run(capsys, "capture", config, "-q", "--set", f"model.adapter={adapters / 'a'}")
    without = run(capsys, "stats", "run.zarr", "-q", "--only", "lens", status=1)
    assert "may change its final norm" in without
    assert "KL" in run(capsys, "stats", "run.zarr", "-q", "--model", adapters / "a")
    run(capsys, "report", "run.zarr", "-q", "--model", adapters / "a")


def test_variants_of_a_configuration_fill_a_store_each(
    config: Path, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    base = content["model"]
    side_by_side = {"name": base, "adapters": {"base": None, "a": str(adapters / "a"), "both": ["a", "b"]}}
    side_by_side["adapters"]["both"] = [{"path": str(adapters / name), "weight": 0.5} for name in "ab"]
    config.write_text(yaml.safe_dump(content | {"model": side_by_side, "store": "runs"}))
    assert "3 of this size" in run(capsys, "plan", config)
    run(capsys, "capture", config, "-q")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a.zarr", "base.zarr", "both.zarr"]
    assert "nothing to do" in run(capsys, "capture", config)
    for name, given in (("base", ()), ("a", (f"model.adapter={adapters / 'a'}",))):
        changes = [part for one in ("model.adapters=null", "store=alone.zarr", *given) for part in ("--set", one)]
        shutil.rmtree("alone.zarr", ignore_errors=True)
        run(capsys, "capture", config, "-q", *changes)
        assert shard_hashes(Path("runs") / f"{name}.zarr") == shard_hashes(Path("alone.zarr"))
    run(capsys, "probe", "runs/base.zarr", "--target", "label", "--layers", "1", "--cv", "2", "-q", "-o", "probes")
    transfer = ("probe", "transfer", "probes", "runs/a.zarr")
    assert "--other-model" in run(capsys, *transfer, status=1)
    assert "accuracy" in run(capsys, *transfer, "--other-model")
    assert "does not use --other-model" in run(
        capsys, "probe", "runs/a.zarr", "--target", "label", "--other-model", status=2
    )
    for command in ("extend", "estimate"):
        assert "model.adapters" in run(capsys, command, config, "-q", status=2)
    refused = run(capsys, "verify", "runs/a.zarr", "--recompute", 1, "--config", config, status=2)
    assert "the model has several variants" in refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"adapters": {}}, "names of letters"),
        ({"adapters": {"../a": "a"}}, "names of letters"),
        ({"adapters": {"base": None}}, "the model has no name"),
        ({"adapters": {"base": None}, "name": "x", "adapter": "a"}, "one adapter, or several variants"),
        ({"adapters": {"a": "a"}, "name": "x", "parallel": {"tensor": 2}}, "several processes share"),
    ],
)
def test_wrong_variants_are_refused_before_anything_is_loaded(
    model: dict, message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"model": model}))
    assert message in run(capsys, "capture", config, "-q", status=2)
