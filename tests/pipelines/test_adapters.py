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
